"""The registries and how a wrong name is told."""

from __future__ import annotations

import pytest
import torch

from steepest.training.errors import UnknownNameError
from steepest.training.registry import get_optimizer, get_task, optimizers, tasks


def test_the_first_tasks_and_optimizers_are_there() -> None:
    assert {"digits", "diabetes", "breast_cancer", "toy_1d", "polynomial"} <= tasks().keys()
    assert {"sven", "sgd", "adam", "lbfgs"} <= optimizers().keys()


@pytest.mark.parametrize(("wrong", "right"), [("digit", "digits"), ("toy1d", "toy_1d"), ("diabets", "diabetes")])
def test_a_wrong_task_is_answered_with_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(UnknownNameError, match=f"unknown task '{wrong}': did you mean '{right}'"):
        get_task(wrong)


def test_a_wrong_optimizer_is_answered_with_all() -> None:
    with pytest.raises(UnknownNameError, match="Known: adam, lbfgs, sgd, sven"):
        get_optimizer("zzz")


@pytest.mark.parametrize("name", sorted(tasks()))
def test_a_task_fits_together(name: str) -> None:
    task = get_task(name)
    splits, model = task.load(0), task.model()
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


@pytest.mark.parametrize("name", sorted(tasks()))
def test_stored_options_fit_the_constructors(name: str) -> None:
    from steepest.training.compare import resolve_options

    for optimizer in optimizers().values():
        options = resolve_options(name, optimizer, {})
        assert set(get_task(name).options.get(optimizer.name, {})) <= options.keys()


@pytest.mark.parametrize("name", ["diabetes", "toy_1d"])
def test_squared_residuals_are_the_losses(name: str) -> None:
    task = get_task(name)
    split, model = task.load(0).val, task.model()
    outputs = model(split.inputs)
    residuals = task.loss.residuals(outputs, split.targets)
    torch.testing.assert_close(residuals.square(), task.loss.per_sample(outputs, split.targets))


def test_cross_entropy_has_no_residuals() -> None:
    task = get_task("digits")
    split = task.load(0).val
    with pytest.raises(ValueError, match="no sum of squares"):
        task.loss.residuals(task.model()(split.inputs), split.targets)
