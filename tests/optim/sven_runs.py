"""Small problems for Sven in float64, and their Jacobian by autograd, row by row."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import steepest as st
from steepest.engine import Jacobian
from steepest.engine.records import MaterializedRecord

DOUBLE = torch.float64


def mlp(outputs: int = 1, *, bias: bool = True, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    layers = nn.Linear(3, 8, bias=bias), nn.Tanh(), nn.Linear(8, outputs, bias=bias)
    return nn.Sequential(*layers).double()


def data(rows: int = 6, outputs: int = 1, seed: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 3, generator=generator, dtype=DOUBLE)
    return x, torch.randn(rows, outputs, generator=generator, dtype=DOUBLE).squeeze(1)


def residuals(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return model(x).squeeze(1) - y


def flat(params: nn.Module | Sequence[Tensor]) -> Tensor:
    given = list(params.parameters()) if isinstance(params, nn.Module) else params
    return torch.cat([p.detach().flatten() for p in given])


def dense_jacobian(params: Sequence[Tensor], rows: Tensor) -> Tensor:
    """``[R, P]``, a backward for each row; parameters that a row does not depend on have zeros."""
    grads = [torch.autograd.grad(row, list(params), retain_graph=True, materialize_grads=True) for row in rows]
    return torch.stack([torch.cat([g.flatten() for g in grad]) for grad in grads])


def jacobian_of(matrix: Tensor) -> Jacobian:
    record = MaterializedRecord({"w": matrix})
    return Jacobian([record], dict(record.shapes), len(matrix), 1 << 20, matrix.device, matrix.dtype)


def snapshot(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def unchanged(model: nn.Module, before: list[Tensor]) -> bool:
    return all(map(torch.equal, before, model.parameters()))


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, tensors within nested states included."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def state_of(opt: torch.optim.Optimizer) -> dict[str, Any]:
    return copy.deepcopy(opt.state_dict())


def seen(opt: st.Sven) -> st.optim.SvenDiagnostics:
    assert opt.diagnostics is not None
    return opt.diagnostics


def counted(closure: Callable[[], Any], change: Callable[[int, Any], Any]) -> Callable[[], Any]:
    """A closure whose n-th call, from 0, returns something else."""
    calls: list[None] = []

    def called() -> Any:
        calls.append(None)
        return change(len(calls) - 1, closure())

    return called
