"""LPSGD and LPSGDM in runs: p follows the budget, and comes back after an interruption."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from steepest.errors import InvalidOptionError
from steepest.training.compare import Request, plan_runs, resolve_options
from steepest.training.execute import execute
from steepest.training.losses import Loss
from steepest.training.registry import get_optimizer, optimizers
from steepest.training.source import Source, resolve
from steepest.training.spec import RunSpec
from steepest.training.steps import StepFunction

# 8 steps in each of 2 epochs.
SPEC = RunSpec("diabetes", "lpsgdm", {"lr": 0.05, "p": 6.0}, epochs=2, batch_size=32)


def seen_ps(monkeypatch: pytest.MonkeyPatch, spec: RunSpec) -> list[float]:
    """p at every step of a run, after the three of the warm-up."""
    seen: list[float] = []
    entry = optimizers()[spec.optimizer]

    def choose(options: Mapping[str, object]) -> StepFunction:
        step = entry.step(options)

        def watched(
            optimizer: torch.optim.Optimizer, model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor
        ) -> Tensor | None:
            seen.append(optimizer.param_groups[0]["p"])
            return step(optimizer, model, loss, inputs, targets)

        return watched

    monkeypatch.setitem(optimizers(), spec.optimizer, replace(entry, step=choose))
    record = execute(spec)
    assert record.status == "finished", record.error
    return seen[3:]


@pytest.mark.parametrize("optimizer", ["lpsgd", "lpsgdm"])
def test_p_falls_along_a_cosine_of_the_steps(monkeypatch: pytest.MonkeyPatch, optimizer: str) -> None:
    found = seen_ps(monkeypatch, replace(SPEC, optimizer=optimizer))
    assert found == pytest.approx([2 + 4 * (1 + math.cos(math.pi * step / 16)) / 2 for step in range(16)])


def test_the_schedule_of_the_learning_rate_changes_nothing_about_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seen_ps(monkeypatch, SPEC) == seen_ps(monkeypatch, replace(SPEC, schedule="constant"))


def test_p_may_fall_along_a_line_after_a_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**SPEC.options, "p_schedule": "linear", "warm_hold": 0.5}
    found = seen_ps(monkeypatch, replace(SPEC, options=options))
    assert found == pytest.approx([6.0] * 8 + [6 - 4 * step / 8 for step in range(8)])


def test_p_may_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    found = seen_ps(monkeypatch, replace(SPEC, options={**SPEC.options, "p_schedule": "constant"}))
    assert found == [6.0] * 16


def test_the_record_tells_p() -> None:
    history = execute(SPEC).history
    assert history[1].diagnostics["p"] == pytest.approx(2 + 4 * (1 + math.cos(math.pi * 7 / 16)) / 2)


def test_an_impossible_p_is_told_before_anything_runs() -> None:
    for options, message in (
        ({"p": 1.0}, "p=1.0"),
        ({"warm_hold": 1.0}, "warm_hold=1.0"),
        ({"p_schedule": "wavy"}, "wavy"),
    ):
        request = Request([Source("diabetes")], ["lpsgdm"], [0], options={"lpsgdm": options})
        with pytest.raises(InvalidOptionError, match=message):
            plan_runs(request)


@pytest.mark.parametrize("name", ["lpsgd", "lpsgdm", "signsgd", "signum", "lion", "sgd-plain"])
def test_it_learns(name: str) -> None:
    entry = get_optimizer(name)
    rate = {"lpsgd": 0.05, "lpsgdm": 0.05, "sgd-plain": 0.3}.get(name, 0.005)
    options = resolve_options(resolve(Source("diabetes")), entry, {"lr": rate})
    record = execute(replace(SPEC, optimizer=name, options=options, epochs=3))
    assert record.status == "finished", record.error
    losses = [point.val_loss for point in record.history]
    assert losses[0] is not None
    assert losses[-1] is not None
    assert losses[-1] < 0.8 * losses[0]
