"""Capture a closure and hold the result against the oracle: what most tests of the engine do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import steepest as st
from oracles import jacobian, reduction_errors, trainable
from steepest.errors import CaptureError, UnsupportedModelError
from zoo_parts import Rows


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def points(rows: int = 6) -> Tensor:
    return torch.randn(rows, 5, dtype=torch.float64)


def capture_rows(capture: st.Capture | nn.Module, closure: Callable[[], Rows]) -> st.Jacobian:
    """The Jacobian of a closure, by a given capture or by a new fast one of a model."""
    if isinstance(capture, nn.Module):
        capture = st.Capture(capture)
    with capture:
        rows = closure()
    return capture.jacobian(rows)


def check(jac: st.Jacobian, model: nn.Module, closure: Callable[[], Rows], tolerance: float = 1e-10) -> None:
    errors = reduction_errors(jac, jacobian(closure, trainable(model)))
    assert max(errors.values()) <= tolerance, errors


def exact_or_refused(capture: st.Capture | nn.Module, model: nn.Module, closure: Callable[[], Rows]) -> str:
    """Capture; return the refusal, or "" after comparing every reduction with the oracle."""
    try:
        jac = capture_rows(capture, closure)
    except (UnsupportedModelError, CaptureError) as error:
        return str(error)
    check(jac, model, closure)
    return ""
