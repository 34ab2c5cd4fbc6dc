"""Models with their batches for metrics of Sven, and the dense solution in a metric."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest as st
from optim.sven_runs import DOUBLE, flat, mlp
from zoo_parts import Net

DAMPING = 0.03


@dataclass(frozen=True)
class Case:
    """A model with its batch: float64, rows ``[B]`` or ``[B, K]``."""

    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Tensor]
    layers: tuple[str, ...]
    inside: tuple[str, ...] = ()  # of them those that the batch does not use

    def fresh(self) -> nn.Module:
        torch.manual_seed(0)
        return self.model().double()

    def x(self, seed: int = 0) -> Tensor:
        return self.batch(torch.Generator().manual_seed(seed))


def normal(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randn(5, *shape, generator=generator, dtype=DOUBLE)


def words(generator: torch.Generator) -> Tensor:
    return torch.randint(6, (5, 4), generator=generator)


def rows_of(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return (out - torch.linspace(-1, 1, out.shape[1], dtype=DOUBLE)).squeeze(1)


CASES = [
    Case("mlp", mlp, normal(3), ("0", "2")),
    Case("no bias", lambda: mlp(bias=False), normal(3), ("0", "2")),
    Case("vector rows", lambda: mlp(3), normal(3), ("0", "2")),
    Case(
        "convolutions",
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(3, 4, 2, bias=False), nn.Tanh(),
            nn.Conv2d(4, 4, 2, groups=2), nn.Flatten(), nn.Linear(4, 1),
        ),
        normal(2, 6, 6),
        ("0", "2", "6"),
    ),
    Case(
        "one layer used three times",
        lambda: Net(
            lambda n, x: n.out(n.twice(n.twice(n.twice(x).tanh()).tanh())), twice=nn.Linear(3, 3), out=nn.Linear(3, 1)
        ),
        normal(3),
        ("twice", "out"),
    ),
    Case(
        "an embedding, a norm and a layer with positions",
        lambda: Net(
            lambda n, x: n.out(n.norm(n.mix(n.table(x)).tanh()).mean(1)),
            table=nn.Embedding(6, 4), mix=nn.Linear(4, 5), norm=nn.LayerNorm(5), out=nn.Linear(5, 2),
        ),
        words,
        ("mix", "out"),
    ),
    Case(
        "a layer that is not used",
        lambda: Net(lambda n, x: n.net(x), idle=nn.Linear(2, 2), net=mlp()),
        normal(3),
        ("net.0", "net.2"),
    ),
]  # fmt: skip
each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def solved(jacobian: Tensor, rows: Tensor, metric: Tensor) -> Tensor:
    """The argument of the minimum, lambda as `Damped` counts it: by the mean eigenvalue of ``J M^-1 J^T``."""
    scale = torch.linalg.solve(metric, jacobian.T)
    damping = DAMPING * float((jacobian @ scale).trace()) / len(rows)
    return torch.linalg.solve(jacobian.T @ jacobian + damping * metric, jacobian.T @ rows)


def sven(model: nn.Module, metric: st.KroneckerMetric | st.BalancedMetric | None, **options: Any) -> st.Sven:
    given = {"lr": 1.0, "rows": "residuals", "solver": st.Damped(DAMPING), "max_norm_ratio": None} | options
    return st.Sven(model, metric=metric, **given)


def taken(model: nn.Module, opt: st.Sven, x: Tensor) -> Tensor:
    before = flat(model)
    opt.step(lambda: rows_of(model, x))
    return before - flat(model)
