"""Rows that depend on each other, however few and however weakly; and rounding, which is no dependence."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import steepest as st
from capturing import capture_rows, check, exact_or_refused
from steepest.errors import CaptureError, SteepestError
from zoo_parts import after, between, residual, rows_of, two_layers

L = nn.Linear


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=lambda order: "".join(map(str, order)))
def test_every_order_of_the_rows(order: tuple[int, ...]) -> None:
    """Some permutations keep any fixed half of the rows together: one fixed probe would miss them."""
    model, x = two_layers().double(), torch.randn(4, 5, dtype=torch.float64)
    for losses in (after(lambda r: r[list(order)]), between(lambda h: h[list(order)])):
        exact_or_refused(model, model, lambda losses=losses: losses(model, x))


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(range(5), 2)))
def test_every_pair_of_interacting_rows(source: int, target: int) -> None:
    model, x = two_layers().double(), torch.randn(5, 5, dtype=torch.float64)

    def leak(h: Tensor) -> Tensor:
        matrix = torch.eye(5, dtype=h.dtype)
        matrix[target, source] = 0.5
        return matrix @ h

    assert exact_or_refused(model, model, lambda: between(leak)(model, x)), "a leak cannot be exact"
    capture = st.Capture(model)
    with pytest.raises(SteepestError), capture:
        capture.jacobian(between(leak)(model, x))


@pytest.mark.parametrize("strength", [1.0, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("rows", [2, 3, 8, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_weak_interactions(dtype: torch.dtype, rows: int, strength: float) -> None:
    """Below the rounding of float32, a leak still shows where there should be an exact zero."""
    model, x = two_layers().to(dtype), torch.randn(rows, 5, dtype=dtype)
    leaky = between(lambda h: h + strength * h.mean(0))
    assert exact_or_refused(model, model, lambda: leaky(model, x)), "an interaction cannot be exact"


@pytest.mark.parametrize("rows", [2, 7, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("depth", [12, 40])
def test_rounding_in_deep_models_is_no_interaction(depth: int, dtype: torch.dtype, rows: int) -> None:
    """Norms and residuals cancel, so gradients carry noise far above one rounding: no reason to refuse."""
    blocks = [residual(nn.Sequential(nn.LayerNorm(8), L(8, 16), nn.GELU(), L(16, 8))) for _ in range(depth)]
    model = nn.Sequential(L(5, 8), nn.InstanceNorm1d(3), *blocks, nn.LayerNorm(8), L(8, 3)).to(dtype)
    x = torch.randn(rows, 3, 5, dtype=dtype)
    jac = capture_rows(model, lambda: rows_of(model(x)))
    check(jac, model, lambda: rows_of(model(x)), tolerance=1e-10 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("size", [0, 1])
def test_few_rows(size: int) -> None:
    model, x = two_layers().double(), torch.randn(6, 5, dtype=torch.float64)
    if size == 0:
        capture = st.Capture(model)
        with capture:
            rows = after(lambda r: r[:0])(model, x)
        with pytest.raises(CaptureError, match=r"(?i)row|empty"):
            capture.jacobian(rows)
    else:
        exact_or_refused(model, model, lambda: after(lambda r: r.sum().view(1))(model, x))


def test_cancellation_is_not_taken_for_interaction() -> None:
    """Terms of 1e4 that cancel to 1: rounding is 1e-3 of the result, as in a model that is blowing up."""
    torch.manual_seed(0)
    model = nn.Sequential(L(1, 16), nn.Tanh(), L(16, 16), nn.Tanh(), L(16, 1))
    with torch.no_grad():
        last, middle = model[4].weight[0], model[2].weight
        across = torch.randn(16)
        across -= last * (across @ last) / last.square().sum()
        middle += 1e4 * across.outer(torch.randn(16))
        model[2].bias.fill_(0)
        model[0].weight.mul_(1e-6)
        model[0].bias.fill_(0)
    for seed in range(5):
        x = torch.randn(32, 1, generator=torch.Generator().manual_seed(seed))
        assert capture_rows(model, lambda x=x: model(x).squeeze(1)).num_rows == 32
