"""Selects what a run goes on with: the model of the moment looks at the training split once more."""

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from steepest.distributed.ranks import RankError
from steepest.training.data import Split, Splits
from steepest.training.records import Selected, finite
from steepest.training.selections import SelectionPlan
from steepest.training.subsets import Subset
from steepest.training.task import Task

if TYPE_CHECKING:
    from steepest.selection.keeping import Keep
    from steepest.selection.method import Method

__all__ = ["noted", "reads_reference", "select_now", "try_out"]

_TRIED = 64


def select_now(
    plan: SelectionPlan,
    seed: int,
    epoch: int,
    task: Task,
    model: nn.Module,
    splits: Splits,
    between: Callable[[], None],
    keep: "Keep | None" = None,
) -> tuple[Subset, Selected]:
    """Select from the training split with the model as it is.

    The model itself is not touched, nor are torch's global generators: a copy of it is scored with, so that hooks of
    an optimizer see nothing of it.

    Args:
        plan: What to select.
        seed: Seed of the run.
        epoch: The epoch that comes next.
        task: The task, whose loss is looked at.
        model: The model.
        splits: The data.
        between: Called again and again meanwhile; what it raises ends the selection.
        keep: Where it is kept, so that an interrupted one is gone on with.

    Returns:
        The subset, and what a record keeps of it (its seconds are not filled in).

    Raises:
        KeyboardInterrupt: If the user stopped this process, or another one that selects with it.
        RankError: If another process failed.
    """
    from steepest.selection.select import select_subset

    train = splits.train
    method = plan.method(seed=seed, epoch=epoch)
    if keep is not None:
        keep = replace(keep, of=f"{plan.text}, seed {seed}, before epoch {epoch}")
    with warnings.catch_warnings():
        # What it warns of is among its notes, which the record keeps.
        warnings.simplefilter("ignore", UserWarning)
        try:
            selection = select_subset(
                _copy(task, model, splits),
                (train.inputs, train.targets),
                task.loss.per_sample,
                count=plan.kept(len(train)),
                method=method,
                labels=train.targets if task.kind == "classification" else None,
                progress=lambda _progress: between(),
                checkpoint=keep,
                review=False,
            )
        except RankError as error:
            if error.interrupted:  # the user stopped another process, and all stop
                raise KeyboardInterrupt from error
            raise
    subset = Subset(torch.as_tensor(selection.indices).long().cpu(), torch.as_tensor(selection.weights).float().cpu())
    report = selection.report
    numbers = {name: finite(float(value)) for name, value in report.numbers.items()}
    return subset, noted(subset, train, epoch, tuple(report.notes), numbers)


def reads_reference(method: "Method") -> bool:
    """Whether a method compares with data of its own, beside those that it chooses from."""
    run = method.begin()
    return any(run.reads(number) == "reference" for number in range(run.passes))


def try_out(method: "Method", task: Task, model: nn.Module, splits: Splits, count: int) -> None:
    """Select from the first samples with a model that was not trained: better an error now than after a training.

    Args:
        method: The method; scope, class policy and layers must fit to one another, and its memory to all samples.
        task: The task.
        model: Its model, any weights.
        splits: Its data.
        count: How many samples it is to keep of all.
    """
    from steepest.selection.select import select_subset

    train, val = splits.train, splits.val
    # Its own random state: that of the run to come must not depend on the trial.
    with warnings.catch_warnings(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        warnings.simplefilter("ignore")  # of so few samples, classes are missing
        select_subset(
            model,
            (train.inputs[:_TRIED], train.targets[:_TRIED]),
            task.loss.per_sample,
            count=1,
            method=method,
            reference=(val.inputs, val.targets) if reads_reference(method) else None,
            review=False,
            alone=True,  # each of several processes sees for itself
        )
        _see_memory(method, task, model, train, count)


def _see_memory(method: "Method", task: Task, model: nn.Module, train: Split, count: int) -> None:
    """Let the method refuse, by its first batch, what would be too large with all samples."""
    from steepest.selection.samples import Samples
    from steepest.selection.scan import FixedModel

    run = method.begin()
    if run.passes and (expect := getattr(run, "expect", None)) is not None:
        expect(len(train))
        first = next(Samples((train.inputs[:_TRIED], train.targets[:_TRIED])).batches())
        with FixedModel(model, method.scope, task.loss.per_sample) as fixed:
            run.update(0, fixed.rows(first))
    if (afford := getattr(run, "afford", None)) is not None:
        afford(count, train.targets if task.kind == "classification" else None)


def noted(
    subset: Subset,
    train: Split,
    epoch: int,
    notes: tuple[str, ...] = (),
    numbers: dict[str, float | None] | None = None,
) -> Selected:
    """What a record keeps of a subset.

    Args:
        subset: The subset.
        train: What it is of.
        epoch: The first epoch that is trained on it.
        notes: What the method has to say.
        numbers: What it measured.

    Returns:
        The entry, with no seconds in it.
    """
    digest = hashlib.sha256(subset.indices.numpy().tobytes() + subset.weights.numpy().tobytes()).hexdigest()[:16]
    return Selected(epoch, len(subset), 0.0, _wrong(train.wrong, subset), digest, notes, numbers or {})


def _wrong(wrong: Tensor | None, subset: Subset) -> tuple[int, int] | None:
    return None if wrong is None else (int(wrong.cpu()[subset.indices].sum()), int(wrong.sum()))


def _copy(task: Task, model: nn.Module, splits: Splits) -> nn.Module:
    """A new model with the same state; a deep copy would take hooks along, which know the original."""
    device = splits.train.inputs.device
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        copy = task.model(splits.shape).to(device)
    copy.load_state_dict(model.state_dict())
    return copy
