"""Sven in the library's own loop: what it is by default, and the loss that a step reports."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import steepest as st
from steepest.training.losses import CrossEntropy, LabelRegression, SquaredError
from steepest.training.registry import get_optimizer
from steepest.training.steps import residuals_step


def problem(outputs: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, outputs)), torch.randn(9, 3), torch.arange(9) % 4


@pytest.mark.parametrize("solver", [None, st.Damped(0.1), st.LevenbergMarquardt()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("loss", [CrossEntropy(), LabelRegression(), SquaredError()], ids=lambda loss: loss.name)
def test_a_step_by_residuals_reports_the_loss_before_it(loss: Any, solver: Any) -> None:
    """Of cross-entropy the rows' squares are something else; and a step that is tried calls the closure again."""
    model, x, y = problem(4)
    targets = torch.randn(9, 4) if isinstance(loss, SquaredError) else y
    opt = st.Sven(model, rows="residuals", solver=solver)
    for _ in range(3):
        want = loss.per_sample(model(x), targets).mean().detach()
        found = residuals_step(opt, model, loss, x, targets)
        torch.testing.assert_close(found, want)
        assert not found.requires_grad
    if isinstance(loss, CrossEntropy):
        squares = loss.residuals(model(x), targets).square().sum(1).mean()
        assert not torch.isclose(F.cross_entropy(model(x), targets), squares, rtol=1e-2)


def test_a_skipped_step_has_no_loss() -> None:
    model, x, y = problem(4)
    opt = st.Sven(model, rows="residuals", on_nonfinite="skip")
    with pytest.warns(RuntimeWarning, match="skipped"):
        assert residuals_step(opt, model, CrossEntropy(), x * torch.nan, y) is None


def test_a_run_tells_the_damping_and_the_length_of_its_steps() -> None:
    model, x, y = problem(4)
    opt = st.Sven(model)
    opt.step(lambda: F.cross_entropy(model(x), y, reduction="none"))
    told = get_optimizer("sven").diagnose(opt)  # type: ignore[misc]
    assert {"damping", "length", "accepted"} <= told.keys()
    assert told["length"] == opt.diagnostics.length  # type: ignore[union-attr]
