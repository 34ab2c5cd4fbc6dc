"""Spectral functions against dense definitions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as hs

from steepest.errors import NonFiniteError
from steepest.linalg import damped_solve, range_finder, spectral_filter, symmetric_spectrum


@given(rows=hs.integers(1, 12), columns=hs.integers(1, 12), seed=hs.integers(0, 99))
def test_spectrum_of_the_gram_is_that_of_the_matrix(rows: int, columns: int, seed: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    spectrum = symmetric_spectrum(matrix @ matrix.T)
    expected = torch.zeros(rows, dtype=torch.float64)
    values = torch.linalg.svdvals(matrix)
    expected[: len(values)] = values
    torch.testing.assert_close(spectrum.values, expected, atol=1e-6, rtol=1e-9)
    rebuilt = spectrum.vectors * spectrum.values.square() @ spectrum.vectors.T
    torch.testing.assert_close(rebuilt, matrix @ matrix.T)


def test_non_finite_gram_is_refused() -> None:
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        symmetric_spectrum(torch.full((2, 2), torch.nan))


@pytest.mark.parametrize(
    ("options", "kept"),
    [({}, 4), ({"rank": 2}, 2), ({"rtol": 0.05}, 3), ({"rtol": 0.05, "rank": 9}, 3), ({"floor": 0.5}, 1)],
    ids=str,
)
def test_truncation(options: dict[str, float], kept: int) -> None:
    values = torch.tensor([10.0, 3.0, 1.0, 0.1])
    inverse, rank = spectral_filter(values, **options)
    assert rank == kept
    torch.testing.assert_close(inverse[:kept], 1 / values[:kept])
    assert not inverse[kept:].any()


def test_zero_matrix_has_rank_zero() -> None:
    inverse, rank = spectral_filter(torch.zeros(3), rtol=1e-3)
    assert rank == 0
    assert not inverse.any()


def test_damped_solve_and_its_failure() -> None:
    gram = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    rhs = torch.tensor([1.0, 2.0], dtype=torch.float64)
    solved = damped_solve(gram, rhs, torch.tensor(0.5, dtype=torch.float64))
    torch.testing.assert_close((gram + 0.5 * torch.eye(2, dtype=torch.float64)) @ solved, rhs)
    assert damped_solve(-gram, rhs, torch.tensor(0.5, dtype=torch.float64)) is None


def test_range_finder_spans_the_dominant_columns() -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(20, 5, generator=generator, dtype=torch.float64)).Q
    matrix = left @ torch.randn(5, 40, generator=generator, dtype=torch.float64)
    basis = range_finder(matrix, 5, 1, generator)
    torch.testing.assert_close(basis @ (basis.T @ matrix), matrix)
    torch.testing.assert_close(basis.T @ basis, torch.eye(5, dtype=torch.float64))
