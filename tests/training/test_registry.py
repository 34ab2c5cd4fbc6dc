"""The registries and how a wrong name is told."""

from __future__ import annotations

import pytest
import torch

from steepest.errors import InvalidOptionError
from steepest.training.errors import UnknownNameError
from steepest.training.losses import SquaredError
from steepest.training.registry import get_optimizer, optimizers, tasks
from steepest.training.rivals import MissingPackageError
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
    known = (
        "adam, adamw, half-inverse, kfac, kfac-2x, fop, lbfgs, lbfgs-full, levenberg-marquardt, lpsgd, lpsgdm, muon, "
        "signsgd, signum, lion, sgd, sgd-plain, soap, sven"
    )
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
        try:
            options = resolve_options(task, optimizer, {})
        except InvalidOptionError as error:
            if isinstance(error.__cause__, MissingPackageError):  # a rival that is not installed: `make peers`
                continue
            raise
        assert set(task.options.get(optimizer.name, {})) <= options.keys()


@pytest.mark.parametrize("name", ["diabetes", "toy_1d"])
def test_squared_residuals_are_the_losses(name: str) -> None:
    task = resolve(Source(name))
    splits = task.load(0)
    split = splits.val
    outputs = task.model(splits.shape)(split.inputs)
    residuals = task.loss.residuals(outputs, split.targets)
    torch.testing.assert_close(residuals.square(), task.loss.per_sample(outputs, split.targets))


def test_residuals_of_cross_entropy_are_rows_of_its_gauss_newton_matrix() -> None:
    """Their products with their own values are the gradient of the summed loss."""
    task = resolve(Source("digits"))
    splits = task.load(0)
    outputs = task.model(splits.shape)(splits.val.inputs).detach().requires_grad_()
    rows = task.loss.residuals(outputs, splits.val.targets)
    assert rows.shape == outputs.shape
    (gradient,) = torch.autograd.grad(rows, outputs, rows.detach())
    (wanted,) = torch.autograd.grad(task.loss.per_sample(outputs, splits.val.targets).sum(), outputs)
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("outputs", [1, 3])
def test_residuals_of_several_outputs_are_vectors(outputs: int) -> None:
    values, targets = torch.randn(5, outputs), torch.randn(5, outputs)
    residuals = SquaredError().residuals(values, targets)
    assert residuals.shape == ((5,) if outputs == 1 else (5, outputs))
    torch.testing.assert_close(residuals.view(5, -1).square().sum(1), SquaredError().per_sample(values, targets))
