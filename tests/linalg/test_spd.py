"""Solutions with positive definite matrices: Cholesky and Newton against inverses, to second order, one by one."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as hs
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from steepest.linalg.spd import newton_inverse, newton_steps, spd_solve


def made(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def definite(*batch: int, size: int = 4, smallest: float = 0.5, seed: int = 0) -> Tensor:
    factor = made(*batch, size, size, seed=seed)
    return factor @ factor.mT / size + smallest * torch.eye(size, dtype=torch.float64)


def ratio(matrix: Tensor) -> float:
    """The largest row sum over the smallest eigenvalue: what `newton_steps` takes."""
    return (matrix.abs().sum(-1).amax() / torch.linalg.eigvalsh(matrix).amin()).item()


def cholesky(matrix: Tensor, rhs: Tensor) -> Tensor:
    return spd_solve(matrix, rhs)


def newton(matrix: Tensor, rhs: Tensor) -> Tensor:
    return newton_inverse(matrix, newton_steps(50.0), converged=True) @ rhs


def few_steps(matrix: Tensor, rhs: Tensor) -> Tensor:
    return newton_inverse(matrix, 3, converged=False) @ rhs


SOLVERS = [cholesky, newton]
Solver = Callable[[Tensor, Tensor], Tensor]


@settings(max_examples=30)
@given(size=hs.integers(1, 8), columns=hs.integers(1, 3), seed=hs.integers(0, 99))
def test_both_solve(size: int, columns: int, seed: int) -> None:
    matrix, rhs = definite(2, 3, size=size, smallest=1.0, seed=seed), made(2, 3, size, columns, seed=seed + 1)
    exact = torch.linalg.inv(matrix) @ rhs
    torch.testing.assert_close(spd_solve(matrix, rhs), exact, rtol=1e-10, atol=1e-12)
    inverse = newton_inverse(matrix, newton_steps(ratio(matrix)), converged=True)
    torch.testing.assert_close(inverse @ rhs, exact, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("solve", [*SOLVERS, few_steps])
def test_gradients_of_first_and_second_order(solve: Solver) -> None:
    """In symmetric directions: the matrix is made symmetric on the way in."""
    matrix, rhs = definite(2, size=3).requires_grad_(), made(2, 3, 2).requires_grad_()
    for check in (gradcheck, gradgradcheck):
        assert check(lambda a, b: solve((a + a.mT) / 2, b), (matrix, rhs), atol=1e-6)


@pytest.mark.parametrize("solve", SOLVERS)
def test_gradients_are_those_of_the_inverse(solve: Solver) -> None:
    matrix, rhs, weights = definite(3).requires_grad_(), made(3, 4, 2).requires_grad_(), made(3, 4, 2, seed=1)
    found = torch.autograd.grad((solve(matrix, rhs) * weights).sum(), (matrix, rhs))
    exact = torch.autograd.grad((torch.linalg.inv(matrix) @ rhs * weights).sum(), (matrix, rhs))
    torch.testing.assert_close(found, exact, rtol=1e-7, atol=1e-8)


def test_only_the_lower_triangle_is_read() -> None:
    matrix, rhs = definite(), made(4, 1)
    assert torch.equal(spd_solve(matrix, rhs), spd_solve(matrix.tril() + 7 * torch.ones(4, 4).triu(1), rhs))


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -1.0])
def test_a_matrix_without_a_factor_gives_nan_for_itself_alone(broken: float) -> None:
    matrix, rhs = definite(3).float(), made(3, 4, 2).float()
    alone = spd_solve(matrix, rhs)
    matrix[1, 2, 2] = broken
    found = spd_solve(matrix, rhs)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], alone[[0, 2]])


@pytest.mark.parametrize("solve", SOLVERS)
def test_no_result_and_no_gradient_depends_on_the_rest_of_the_batch(solve: Solver) -> None:
    """Bit for bit: the other matrices are of another size of number, or hold NaN."""

    def results(others: Tensor) -> list[Tensor]:
        matrix = torch.cat([definite(1), others]).requires_grad_()
        rhs = made(3, 4, 2).requires_grad_()
        solution = solve(matrix, rhs)
        return [solution[0], *(g[0] for g in torch.autograd.grad(solution[0].sum(), (matrix, rhs)))]

    first = results(definite(2, seed=5))
    for others in (1e6 * definite(2, seed=6), torch.full((2, 4, 4), torch.nan, dtype=torch.float64)):
        for a, b in zip(first, results(others), strict=True):
            assert torch.equal(a, b)


# How many steps


@pytest.mark.parametrize("condition", [1.0, 1.5, 30.0, 4900.0, 1e6])
def test_the_steps_suffice_for_the_worst_matrix_and_are_not_far_too_many(condition: float) -> None:
    """The worst direction starts at 1 - 1 / c^2, and each step squares what is left of I - V P."""
    matrix = torch.diag(torch.tensor([1.0, 1 / condition], dtype=torch.float64))
    left = [
        (torch.eye(2, dtype=torch.float64) - newton_inverse(matrix, steps, converged=True) @ matrix).abs().max()
        for steps in (newton_steps(condition), newton_steps(condition) - 2)
    ]
    assert left[0] <= 1e-8
    assert condition == 1 or left[1] > 1e-8
    start = 1 - 1 / condition**2
    few = newton_inverse(matrix, 3, converged=False)
    assert math.isclose(1 - (few @ matrix)[1, 1].item(), start**8, rel_tol=1e-6, abs_tol=1e-12)


def test_a_converged_inverse_saves_one_matrix_and_an_unconverged_one_saves_them_all() -> None:
    def saved(converged: bool) -> int:
        matrix, seen = definite(size=6).requires_grad_(), set()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.add(t.data_ptr()) or t, lambda t: t):
            newton_inverse(matrix, 20, converged=converged)
        return len(seen)

    assert saved(converged=True) == 1
    assert saved(converged=False) >= 20


@pytest.mark.parametrize("solve", [*SOLVERS, few_steps])
def test_torch_func_maps_over_it(solve: Solver) -> None:
    matrix, rhs = definite(3), made(3, 4, 2)
    torch.testing.assert_close(torch.func.vmap(solve)(matrix, rhs), solve(matrix, rhs))
    per_sample = torch.func.vmap(torch.func.grad(lambda a, b: solve(a, b).square().sum()))(matrix, rhs)
    matrix.requires_grad_()
    torch.testing.assert_close(per_sample, torch.autograd.grad(solve(matrix, rhs).square().sum(), matrix)[0])
