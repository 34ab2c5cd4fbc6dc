"""Classification tasks of which some training labels are wrong, and known to be: they show who drops those.

Symmetric noise, as the literature on noisy labels has it: a wrong label is any other class, all with equal chances.
Validation and test stay as they are.
"""

from dataclasses import replace

import torch

from steepest._validation import check_real
from steepest.errors import InvalidOptionError
from steepest.training.data import Split, Splits
from steepest.training.errors import DataError
from steepest.training.task import FileTask, Task
from steepest.training.tasks.bundled import DIGITS
from steepest.training.tasks.images import CIFAR10_RESNET, FASHION_MNIST, FASHION_MNIST_CNN

__all__ = ["ENTRIES", "wrong_labels"]

_STREAM = 0x77726F6E67


def wrong_labels(task: Task, share: float) -> Task:
    """The same task with another class as the target of some training samples.

    Of N training samples `round(share * N)` get a wrong label, drawn by a generator that the data seed starts; the
    split's `wrong` marks them. Nothing else changes. Stored options are left out: they were chosen for other data.

    Args:
        task: A classification.
        share: Share of the training samples, in (0, 1).

    Returns:
        The new task.

    Raises:
        InvalidOptionError: If the task is no classification or the share is impossible.
        DataError: From `load` of the new task, if there is one class only.
    """
    check_real("share", share, low=0, high=1, open_low=True, open_high=True)
    if task.kind != "classification":
        raise InvalidOptionError(
            f"task {task.name} is a {task.kind} and wrong labels are other classes: give a classification"
        )

    def load(data_seed: int) -> Splits:
        splits = task.load(data_seed)
        classes = splits.shape.outputs
        if classes < 2:
            raise DataError(f"the labels of {task.name} cannot be wrong, there is one class only: give data with more")
        return replace(splits, train=_mislabelled(splits.train, classes, share, data_seed))

    return replace(
        task,
        name=_name(task, share),
        description=_description(task, share),
        load=load,
        options={},
        options_source=None,
    )


def _mislabelled(train: Split, classes: int, share: float, data_seed: int) -> Split:
    # A stream of its own: a split or a random choice by the same seed must not be the same permutation.
    generator = torch.Generator().manual_seed(_STREAM + data_seed)
    chosen = torch.randperm(len(train), generator=generator)[: round(share * len(train))]
    # A step of 1 to classes - 1 around the circle of classes: every other class, and never the right one.
    steps = torch.randint(1, classes, (len(chosen),), generator=generator)
    targets, wrong = train.targets.clone(), torch.zeros(len(train), dtype=torch.bool)
    targets[chosen] = (targets[chosen] + steps) % classes
    wrong[chosen] = True
    return Split(train.inputs, targets, wrong)


def _name(entry: Task | FileTask, share: float) -> str:
    return f"{entry.name}_wrong{100 * share:g}"


def _description(entry: Task | FileTask, share: float) -> str:
    return f"{entry.description}; {100 * share:g} % of the training labels wrong"


def _from_files(entry: FileTask, share: float) -> FileTask:
    return replace(
        entry,
        name=_name(entry, share),
        description=_description(entry, share),
        at=lambda folder: wrong_labels(entry.at(folder), share),
    )


ENTRIES: list[Task | FileTask] = [
    wrong_labels(DIGITS, 0.2),
    _from_files(FASHION_MNIST, 0.2),
    _from_files(FASHION_MNIST_CNN, 0.2),
    _from_files(CIFAR10_RESNET, 0.2),
]
