"""The registries and how a wrong name is told."""

from __future__ import annotations

import pytest
import torch

from steepest.training.errors import UnknownNameError
from steepest.training.registry import get_optimizer, optimizers, tasks
from steepest.training.source import Source, resolve
from steepest.training.task import Task


def test_the_first_tasks_and_optimizers_are_there() -> None:
    assert {"digits", "diabetes", "breast_cancer", "toy_1d", "polynomial"} <= tasks().keys()
    assert {"sven", "sgd", "adam", "lbfgs"} <= optimizers().keys()


@pytest.mark.parametrize(("wrong", "right"), [("digit", "digits"), ("toy1d", "toy_1d"), ("diabets", "diabetes")])
def test_a_wrong_task_is_answered_with_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(UnknownNameError, match=f"unknown task '{wrong}': did you mean '{right}'"):
        resolve(Source(wrong))


def test_a_wrong_optimizer_is_answered_with_all() -> None:
    known = "adam, adamw, kfac, kfac-2x, fop, lbfgs, lpsgd, lpsgdm, signsgd, signum, lion, sgd, sgd-plain, sven"
    with pytest.raises(UnknownNameError, match=f"Known: {known}"):
        get_optimizer("zzz")


OFFLINE = sorted(name for name, entry in tasks().items() if isinstance(entry, Task))


@pytest.mark.parametrize("name", OFFLINE)
def test_a_task_fits_together(name: str) -> None:
    task = resolve(Source(name))
    splits = task.load(0)
    model = task.model(splits.shape)
    inputs, targets = splits.train.inputs[:8], splits.train.targets[:8]
    losses = task.loss.per_sample(model(inputs), targets)
    assert losses.shape == (8,)
    assert torch.isfinite(losses).all()
    assert len(splits.train) >= task.batch_size
    for part in (splits.train, splits.val, splits.test):
        assert len(part.inputs) == len(part.targets)
        assert torch.isfinite(part.inputs).all()
    for metric in task.metrics:
        assert isinstance(metric.compute(model(inputs), targets), float)


@pytest.mark.parametrize("name", OFFLINE)
def test_stored_options_fit_the_constructors(name: str) -> None:
    from steepest.training.compare import resolve_options

    for optimizer in optimizers().values():
        task = resolve(Source(name))
        options = resolve_options(task, optimizer, {})
        assert set(task.options.get(optimizer.name, {})) <= options.keys()


@pytest.mark.parametrize("name", ["diabetes", "toy_1d"])
def test_squared_residuals_are_the_losses(name: str) -> None:
    task = resolve(Source(name))
    splits = task.load(0)
    split = splits.val
    outputs = task.model(splits.shape)(split.inputs)
    residuals = task.loss.residuals(outputs, split.targets)
    torch.testing.assert_close(residuals.square(), task.loss.per_sample(outputs, split.targets))


def test_cross_entropy_has_no_residuals() -> None:
    task = resolve(Source("digits"))
    splits = task.load(0)
    with pytest.raises(ValueError, match="no sum of squares"):
        task.loss.residuals(task.model(splits.shape)(splits.val.inputs), splits.val.targets)
