"""A small network, its data and its steps: what the tests of KFAC have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest as st
from steepest.linalg.kronecker import KroneckerSolver
from steepest.optim.fisher import Exact, Fisher, MonteCarlo

L, S = nn.Linear, nn.Sequential
DOUBLE = torch.float64
STILL: dict[str, Any] = {"lr": 0.0, "momentum": 0.0, "kl_clip": None}
EVERY: dict[str, Any] = {"factor_update_steps": 1, "inverse_update_steps": 1}
SOLVERS: dict[str, KroneckerSolver] = {
    "eigenbasis": st.Eigenbasis(),
    "cholesky": st.Cholesky(),
    "corrected": st.EigenbasisCorrected(),
}
FISHERS: dict[str, Fisher] = {"empirical": st.Empirical(), "exact": Exact(), "monte_carlo": MonteCarlo(draws=2)}
both = pytest.mark.parametrize("fisher", [FISHERS["empirical"], FISHERS["exact"]], ids=["empirical", "exact"])


def mlp(seed: int = 0, classes: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return S(L(4, 5), nn.Tanh(), L(5, classes)).double()


def data(rows: int = 8, seed: int = 1, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 4, generator=generator, dtype=DOUBLE), torch.arange(rows) % classes


def train(model: nn.Module, opt: torch.optim.Optimizer, x: Tensor, y: Tensor, loss: Callable[..., Tensor]) -> float:
    opt.zero_grad()
    value = loss(model(x), y)
    value.backward()
    opt.step()
    return float(value.detach())


def factors(opt: st.KFAC) -> dict[str, tuple[Tensor, Tensor]]:
    """The bias-corrected running factors of every layer."""
    found = {}
    for block in opt._blocks.values():
        state = opt.state[block.weight]
        found[block.name] = (state["input_factor"] / state["weight"], state["grad_factor"] / state["weight"])
    return found


def factors_after(
    model: nn.Module, loss: Callable[..., Tensor], *batches: tuple[Tensor, Tensor], **options: Any
) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors of one step that moves nothing; several batches are accumulated."""
    opt = st.KFAC(model, **{**STILL, **options})
    opt.zero_grad()
    for x, y in batches:
        (loss(model(x), y) / (len(batches) if options.get("reduction") != "sum" else 1)).backward()
    opt.step()
    opt.close()
    return factors(opt)


def assert_same(a: dict[str, tuple[Tensor, Tensor]], b: dict[str, tuple[Tensor, Tensor]], rtol: float = 1e-9) -> None:
    assert a.keys() == b.keys()
    for name in a:
        for left, right in zip(a[name], b[name], strict=True):
            torch.testing.assert_close(left, right, rtol=rtol, atol=1e-12)


def snapshot(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]
