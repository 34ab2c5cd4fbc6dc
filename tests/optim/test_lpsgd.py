"""LPSGD and LPSGDM: the mathematics, against torch's SGD and slow, obvious formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st_
from torch import Tensor
from torch.optim import Optimizer

import steepest as st
from steepest.linalg.power import lp_direction

SHAPES = [(3,), (4, 5), (), (1, 1), (2, 3, 3, 3), (33,), (257,), (64,), (8, 0)]
Optimizers = Callable[..., Optimizer]


def tensors(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in SHAPES
    ]


def train(params: list[torch.nn.Parameter], opt: Optimizer, steps: int = 4, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        for param in params:
            noise = torch.randn(param.shape, generator=generator, dtype=torch.float64)
            param.grad = (scale * noise).to(param.dtype)
        opt.step()
    return [param.detach().clone() for param in params]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("foreach", [None, False, True])
def test_p_2_is_torchs_sgd_to_the_bit(dtype: torch.dtype, maximize: bool, foreach: bool | None) -> None:
    a, b = ([*tensors(dtype=dtype), torch.nn.Parameter(torch.ones(300_007, dtype=dtype))] for _ in range(2))
    ours = st.LPSGD(a, lr=0.1, p=2.0, maximize=maximize, foreach=foreach)
    theirs = torch.optim.SGD(b, lr=0.1, maximize=maximize, foreach=foreach)
    assert_same(train(a, ours), train(b, theirs))


def test_p_2_with_momentum_is_sgd_on_the_running_mean_to_the_bit() -> None:
    a, b = tensors(), tensors()
    train(a, st.LPSGDM(a, lr=0.1, p=2.0, momentum=0.8, weight_decay=0.3))
    means = [torch.zeros_like(param) for param in b]

    class Averaged(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            del closure
            with torch.no_grad():
                for param, mean in zip(b, means, strict=True):
                    param.grad = mean.lerp_(param.grad, 1 - 0.8)  # type: ignore[arg-type]
                    param.mul_(1 - 0.1 * 0.3)
            super().step()

    train(b, Averaged(b, lr=0.1))
    assert_same([p.detach() for p in a], [p.detach() for p in b])


def test_without_momentum_both_are_one_to_the_bit() -> None:
    a, b = tensors(), tensors()
    first = train(a, st.LPSGD(a, lr=0.1, p=5.0, weight_decay=0.2))
    opt = st.LPSGDM(b, lr=0.1, p=5.0, momentum=0.0, weight_decay=0.2)
    assert_same(first, train(b, opt))
    assert not opt.state


@pytest.mark.parametrize("kind", [st.LPSGD, st.LPSGDM])
@pytest.mark.parametrize("p", [2.0, 2.5, 3.0, 4.0, 10.0])
@pytest.mark.parametrize("maximize", [False, True])
def test_a_step_is_the_formula(kind: Optimizers, p: float, maximize: bool) -> None:
    params = tensors(dtype=torch.float64)
    twins = [param.detach().clone() for param in params]
    found = train(params, kind(params, lr=0.1, p=p, weight_decay=0.3, eps=1e-6, maximize=maximize), scale=0.1)
    beta, rho, generator = 0.9 if kind is st.LPSGDM else 0.0, (p - 2) / (p - 1), torch.Generator().manual_seed(7)
    means = [torch.zeros_like(twin) for twin in twins]
    for _ in range(4):
        for twin, mean in zip(twins, means, strict=True):
            grad = 0.1 * torch.randn(twin.shape, generator=generator, dtype=torch.float64)
            mean.copy_(beta * mean + (1 - beta) * grad)
            direction = mean / (mean.abs() + 1e-6) ** rho
            twin.copy_((1 - 0.1 * 0.3) * twin - (-0.1 if maximize else 0.1) * direction)
    for a, b in zip(found, twins, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@given(st_.floats(2.0, 50.0), st_.integers(0, 10**6))
def test_it_is_the_steepest_direction_of_its_norm(p: float, seed: int) -> None:
    g = torch.randn(40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    v = lp_direction(g, p, 1e-30)
    q = p / (p - 1)
    assert float(g @ v) == pytest.approx(float(g.norm(q) * v.norm(p)), rel=1e-10)  # Hoelder's inequality, with equality
    other = torch.randn(40, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    assert float(g @ other) / float(other.norm(p)) < float(g @ v) / float(v.norm(p)) * (1 + 1e-12)


def test_a_full_vector_beside_an_empty_tensor_is_no_special_case() -> None:
    params = [torch.nn.Parameter(torch.ones(size)) for size in (64, 0)]
    for param in params:
        param.grad = torch.full_like(param, 8.0)
    st.LPSGD(params, lr=0.1, p=4.0).step()
    torch.testing.assert_close(params[0].detach(), torch.full((64,), 0.8))


@pytest.mark.parametrize("kind", [st.LPSGD, st.LPSGDM])
def test_large_p_descends_along_the_signs(kind: Optimizers) -> None:
    params = tensors()
    before = [param.detach().clone() for param in params]
    generator = torch.Generator().manual_seed(7)
    signs = [torch.randn(param.shape, generator=generator, dtype=torch.float64).sign() for param in params]
    for old, new, sign in zip(before, train(params, kind(params, lr=0.1, p=1e6), steps=1), signs, strict=True):
        torch.testing.assert_close(new, old - 0.1 * sign.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("p", [2.0, 3.0, 4.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_zero_gradient_moves_nothing(p: float, dtype: torch.dtype) -> None:
    param = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.0], dtype=dtype))
    param.grad = torch.tensor([0.0, -0.0, 0.0], dtype=dtype)
    for kind in (st.LPSGD, st.LPSGDM):
        kind([param], lr=1.0, p=p, eps=1e-30).step()
    assert param.tolist() == [1.0, -2.0, 0.0]


@pytest.mark.parametrize("c", [1e-3, 7.0, 1e4])
def test_a_scaled_gradient_scales_the_direction_by_its_own_power(c: float) -> None:
    g = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for p in (2.0, 3.0, 6.0):
        rho = (p - 2) / (p - 1)
        scaled = lp_direction(c * g, p, 1e-30)
        torch.testing.assert_close(scaled, c ** (1 - rho) * lp_direction(g, p, 1e-30), rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_power_of_half_precision_is_taken_in_float32(dtype: torch.dtype) -> None:
    # In float16 an eps of 1e-8 is zero, and 3e-4 to the power of -0.9 has one correct digit.
    grads = torch.tensor([0.0, 6e-5, -3e-4, 0.02, -5.0, 300.0], dtype=dtype)
    param = torch.nn.Parameter(torch.zeros_like(grads))
    param.grad = grads.clone()
    st.LPSGD([param], lr=1.0, p=11.0).step()
    exact = grads.double() / (grads.double().abs() + 1e-8) ** 0.9
    torch.testing.assert_close(param.detach().double(), -exact, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [st.LPSGD, st.LPSGDM])
def test_joined_tensors_move_as_single_ones_to_the_bit(kind: Optimizers, dtype: torch.dtype, threads: int) -> None:
    before, results = torch.get_num_threads(), []
    torch.set_num_threads(threads)
    try:
        for foreach in (True, False, None):
            params = tensors(dtype=dtype)
            # Many threads, and beyond the size of a piece, in both layouts.
            params += [torch.nn.Parameter(torch.ones(size, dtype=dtype)) for size in (40_001, 50_001, 300_007)]
            params += [torch.nn.Parameter(torch.ones(2, 64, 40, 30, dtype=dtype).to(memory_format=torch.channels_last))]
            results.append(train(params, kind(params, lr=0.1, p=3.5, weight_decay=0.1, foreach=foreach)))
    finally:
        torch.set_num_threads(before)
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def test_every_group_has_its_own_p() -> None:
    a, b = tensors(), tensors()
    groups = [{"params": a[:2], "p": 2.0}, {"params": a[2:4], "p": 7.0, "eps": 1e-3}, {"params": a[4:]}]
    train(a, st.LPSGDM(groups, lr=0.1, p=3.0))
    generator = torch.Generator().manual_seed(7)
    twins = [
        st.LPSGDM(b[:2], lr=0.1, p=2.0),
        st.LPSGDM(b[2:4], lr=0.1, p=7.0, eps=1e-3),
        st.LPSGDM(b[4:], lr=0.1, p=3.0),
    ]
    for _ in range(4):
        for param in b:
            param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).float()
        for twin in twins:
            twin.step()
    assert_same([p.detach() for p in a], [p.detach() for p in b])


@pytest.mark.parametrize("p", [2.0, 4.0])
def test_outliers_of_the_curvature_bound_the_rate_less(p: float) -> None:
    # Curvatures 100 and 1 with lr 0.05: SGD must diverge, and p = 4 must not.
    x = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    opt = st.LPSGD([x], lr=0.05, p=p)
    for _ in range(60):
        x.grad = torch.tensor([100.0, 1.0], dtype=torch.float64) * x.detach()
        opt.step()
    assert bool(x.abs().max() > 1e6) if p == 2 else bool(x.abs().max() < 0.1)
