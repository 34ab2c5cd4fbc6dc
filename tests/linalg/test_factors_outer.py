"""Products of a matrix with its own transpose: half of them is formed, nothing is lost."""

import pytest
import torch
from torch import Tensor

from steepest.linalg.outer import MeanOuter, add_outer, mirror_upper, outer

# Rows and columns: one row, too small to be halved, the first that is, odd sizes, the last with 4 blocks, 8 blocks.
SIZES = [(1, 1), (5, 700), (127, 1100), (128, 1024), (131, 1025), (514, 67), (1023, 17), (1024, 16), (1031, 33)]
HALVED = [size for size in SIZES if size[0] >= 128]


def whole_numbers(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Their products are exact in any order of summation, so that results can be compared to the bit."""
    return torch.randint(-4, 5, (rows, columns), generator=torch.Generator().manual_seed(rows)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_half_the_product_is_the_whole_product(size: tuple[int, int], transposed: bool, dtype: torch.dtype) -> None:
    matrix = whole_numbers(*size, dtype)
    matrix = matrix.T.contiguous().T if transposed else matrix
    found = outer(matrix)
    assert torch.equal(found, matrix @ matrix.T)
    assert torch.equal(found, found.T)


@pytest.mark.parametrize("size", HALVED, ids=str)
def test_blocks_below_the_diagonal_are_not_formed_but_mirrored(size: tuple[int, int]) -> None:
    matrix = torch.randn(size, generator=torch.Generator().manual_seed(0))
    total = torch.full((len(matrix), len(matrix)), torch.nan)
    add_outer(total, matrix, keep=False)
    share = float(total.isnan().double().mean())
    assert share > (0.43 if len(matrix) >= 1024 else 0.36)  # (1 - 1 / blocks) / 2
    below = total.isnan()
    assert not total.triu().isnan().any()
    mirror_upper(total)
    assert torch.equal(total[below], total.T[below])
    torch.testing.assert_close(total.double(), matrix.double() @ matrix.double().T, rtol=0, atol=1e-5 * size[1])


@pytest.mark.parametrize("rows", [6, 131, 1031])
def test_a_mean_of_pieces_is_the_mean_of_all(rows: int) -> None:
    # The second piece is too thin to be halved, and the first and the third are not.
    pieces = [whole_numbers(rows, columns, torch.float64) for columns in (1100, 3, 1050)]
    mean = MeanOuter(4096)
    for piece in pieces:
        mean.add(piece)
    every = torch.cat(pieces, 1)
    assert torch.equal(mean.value(), every @ every.T / 4096)  # a power of two: dividing is exact


def test_the_mean_of_nothing_is_not_a_number() -> None:
    mean = MeanOuter(0)
    mean.add(torch.zeros(3, 0))
    assert mean.value().isnan().all()


def test_a_mean_without_a_piece_has_no_size() -> None:
    with pytest.raises(RuntimeError, match="nothing was added"):
        MeanOuter(2).value()


def error_of_the_mean(matrix: Tensor) -> float:
    """Largest error of an entry, relative to the largest entry; by a piece as a whole, and one in two parts."""
    exact = matrix.double() @ matrix.double().T / matrix.shape[1]
    worst = 0.0
    for pieces in (matrix.split(matrix.shape[1], 1), matrix.split(matrix.shape[1] // 2 + 1, 1)):
        mean = MeanOuter(matrix.shape[1])
        for piece in pieces:
            mean.add(piece)
        found = mean.value()
        assert found.dtype == matrix.dtype
        worst = max(worst, float((found - exact).abs().max() / exact.abs().max()))
    return worst


SAMPLES = [(6, 40), (131, 1025), (1031, 33)]


@pytest.mark.parametrize("size", SAMPLES, ids=str)
def test_means_keep_full_precision_under_autocast(size: tuple[int, int]) -> None:
    matrix = torch.randn(size, generator=torch.Generator().manual_seed(0))
    plain = error_of_the_mean(matrix)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (matrix @ matrix.T).dtype == torch.bfloat16
        assert error_of_the_mean(matrix) == plain < 1e-6


@pytest.mark.parametrize("size", SAMPLES, ids=str)
def test_means_are_formed_in_double_where_the_caller_allows_less_than_single(size: tuple[int, int]) -> None:
    matrix = torch.randn(size, generator=torch.Generator().manual_seed(0))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        mean = MeanOuter(size[1])
        mean.add(matrix)
        found = mean.value()
    finally:
        torch.set_float32_matmul_precision(before)
    assert found.dtype == torch.float32
    # Sums of single precision differ by far more where positive and negative terms cancel.
    exact = (matrix.double() @ matrix.double().T / size[1]).float()
    torch.testing.assert_close(found, exact, rtol=1.2e-7, atol=0)
