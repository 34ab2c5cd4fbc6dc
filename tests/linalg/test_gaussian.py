"""The Gaussian kernel: its values, its gradients to second order, and points where expanded squares go wrong."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as hs
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from attending import gaussian
from steepest.linalg import gaussian as module
from steepest.linalg.gaussian import gaussian_gram, gaussian_kernel, pieces, squared_distances


def made(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@settings(max_examples=50)
@given(
    n=hs.integers(1, 9), m=hs.integers(1, 9), d=hs.integers(1, 5), scale=hs.floats(0.01, 9.0), seed=hs.integers(0, 99)
)
def test_the_kernel_is_that_of_differences(n: int, m: int, d: int, scale: float, seed: int) -> None:
    x, y = made(2, n, d, seed=seed), made(2, m, d, seed=seed + 1)
    for found, a, b in zip(gaussian_kernel(x, y, scale), x, y, strict=True):
        torch.testing.assert_close(found, gaussian(a, b, scale), rtol=1e-12, atol=1e-14)
    for found, a in zip(gaussian_gram(y, scale), y, strict=True):
        torch.testing.assert_close(found, gaussian(a, a, scale), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", [(4, 3), (2, 4, 1), (2, 1, 3, 2)])
def test_gradients_of_first_and_second_order(shape: tuple[int, ...]) -> None:
    x, y = made(*shape).requires_grad_(), made(*shape[:-2], 3, shape[-1], seed=1).requires_grad_()
    for check in (gradcheck, gradgradcheck):
        assert check(lambda x, y: gaussian_kernel(x, y, 0.7), (x, y))
        assert check(lambda x: gaussian_gram(x, 0.7), (x,))


def test_gradients_of_one_set_with_itself_are_those_of_the_gram() -> None:
    x, weights = made(5, 3).requires_grad_(), made(5, 5, seed=1)
    one = torch.autograd.grad((gaussian_kernel(x, x) * weights).sum(), x)
    other = torch.autograd.grad((gaussian_gram(x) * weights).sum(), x)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, weights = made(2, 3, 23, 4).requires_grad_(), made(2, 3, 5, 4, seed=1).requires_grad_(), made(2, 3, 23, 5)

    def results() -> list[Tensor]:
        kernel = gaussian_kernel(x, y)
        return [kernel, *torch.autograd.grad((kernel * weights).sum(), (x, y))]

    whole = results()
    assert pieces(x, y) == [slice(0, 23)]
    monkeypatch.setattr(module, "_CPU_PIECE", 2000)
    parts = pieces(x, y)
    assert len(parts) == 3
    assert [t for part in parts for t in range(23)[part]] == list(range(23))
    torch.testing.assert_close(results(), whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("size", [1, 2000, 1 << 20])
def test_distances_by_broadcasting_are_those_of_a_cpu(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices other than CPUs, and the compiler, go another way."""
    points = 10.0 ** torch.arange(3).view(3, 1, 1) * made(3, 23, 4, dtype=torch.float32)
    direct = squared_distances(points)
    monkeypatch.setattr(module, "_CPU_PIECE", size)
    parts = pieces(points, points, 4)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        patch.setattr(module, "pieces", lambda *_: parts)
        broadcast = squared_distances(points)
    assert len(parts) == {1: 23, 2000: 23, 1 << 20: 1}[size]
    assert torch.equal(broadcast, broadcast.mT)
    torch.testing.assert_close(broadcast, direct, rtol=1e-5, atol=0)


# Far from the origin, far apart, and beyond


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_gram_is_symmetric_with_ones_on_its_diagonal_and_no_negative_eigenvalue(dtype: torch.dtype) -> None:
    """Points in clusters that are far from each other: expanded squares make such a matrix indefinite."""
    for far in (1.0, 1e3, 1e7, 1e10, 1e17):
        centres = far * made(5, 32, dtype=dtype)
        points = centres[torch.arange(49) % 5] + 0.1 * made(49, 32, seed=1, dtype=dtype)
        gram = gaussian_gram(points)
        assert gram.dtype == dtype
        assert torch.equal(gram, gram.mT)
        assert (gram.diagonal() == 1).all()
        assert torch.linalg.eigvalsh(gram.double())[0] > -1e-5


def test_equal_points_are_equal_however_far_they_are() -> None:
    points = torch.tensor([[1e10, -3e9], [2e9, 1e10], [1e10, -3e9], [1e10, 1e10]])
    expected = torch.eye(4)
    expected[0, 2] = expected[2, 0] = 1
    assert torch.equal(gaussian_gram(points), expected)


@pytest.mark.parametrize("offset", [0.0, 10.0, 1e3])
def test_moving_all_points_changes_little_in_float32(offset: float) -> None:
    x, y = made(50, 8).float() + offset, made(7, 8, seed=1).float() + offset
    exact = gaussian(x.double(), y.double())
    torch.testing.assert_close(gaussian_kernel(x, y).double(), exact, rtol=0, atol=2e-6)
    x.requires_grad_()
    found = torch.autograd.grad(gaussian_kernel(x, y).sum(), x)[0].double()
    wanted = -(exact.unsqueeze(-1) * (x.detach().double().unsqueeze(1) - y.double())).sum(1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("far", [1e10, 1e17, 1e19, 1e30])
def test_huge_coordinates_overflow_nowhere(far: float) -> None:
    x, y = (far * made(9, 4).float()).requires_grad_(), (far * made(3, 4, seed=1).float()).requires_grad_()
    for kernel in (gaussian_kernel(x, y), gaussian_gram(y)):
        assert ((kernel >= 0) & (kernel <= 1)).all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(kernel.sum(), (x, y), materialize_grads=True))


def test_nan_stays_and_stays_alone() -> None:
    points = made(2, 4, 3)
    points[1, 2, 0] = torch.nan
    gram, kernel = gaussian_gram(points), gaussian_kernel(points, made(2, 3, 3, seed=1))
    assert gram[0].isfinite().all()
    assert kernel[0].isfinite().all()
    assert torch.equal(gram[1].isnan().diagonal(), torch.tensor([False, False, True, False]))
    assert torch.equal(kernel[1].isnan().all(1), torch.tensor([False, False, True, False]))


# Where it runs


def test_torch_func_maps_over_it() -> None:
    x, y = made(3, 6, 2), made(3, 4, 2, seed=1)
    for function in (lambda a: gaussian_kernel(a, y[0]), gaussian_gram):
        assert torch.equal(torch.func.vmap(function)(x), torch.stack([function(a) for a in x]))
        second = torch.func.jacrev(torch.func.jacrev(lambda a: function(a).square().sum()))  # noqa: B023
        expected = torch.autograd.functional.hessian(lambda a: function(a).square().sum(), x[0])  # noqa: B023
        torch.testing.assert_close(second(x[0]), expected)
    assert torch.func.vmap(gaussian_kernel, in_dims=(None, 0))(x[0], y).shape == (3, 6, 4)


def test_shapes_without_data() -> None:
    x = torch.empty(2, 6, 4, device="meta", requires_grad=True)
    gaussian_kernel(x, x).sum().backward()
    gaussian_gram(x).sum().backward()
    assert x.grad.shape == x.shape
