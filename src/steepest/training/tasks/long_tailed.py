"""Long-tailed forms of classification tasks: the training part holds fewer samples of every further class.

The imbalance is the usual one of the literature (Cui et al. 2019, arXiv 1901.05555). Validation and test stay as they
are, so that every class counts as before when a model is judged.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from steepest._validation import check_real
from steepest.errors import InvalidOptionError
from steepest.training.data import Split, Splits
from steepest.training.errors import DataError
from steepest.training.metrics import Metric
from steepest.training.task import FileTask, Task
from steepest.training.tasks.bundled import DIGITS
from steepest.training.tasks.images import CIFAR10_RESNET, FASHION_MNIST_CNN

__all__ = ["ENTRIES", "RARE_ACCURACY", "long_tailed"]


def _rare_accuracy(outputs: Tensor, targets: Tensor) -> float:
    classes = outputs.shape[1]
    right = (outputs.argmax(dim=1) == targets).double()
    groups = [right[targets == number] for number in range(classes - max(1, classes // 3), classes)]
    means = [group.mean().item() for group in groups if len(group)]
    return sum(means) / len(means) if means else math.nan


# Mean over classes: the rarest third is the last one, as the sizes fall with the number of the class.
RARE_ACCURACY = Metric("rare_accuracy", "accuracy of rare classes", higher_is_better=True, compute=_rare_accuracy)


def long_tailed(task: Task, imbalance: float) -> Task:
    """The same task with a training part whose classes fall off in equal ratios.

    With n the size of the smallest class of the whole training part, class c of C keeps
    `round(n * imbalance ** (-c / (C - 1)))` of its training samples, at least 1: the first class n, the last one
    n / imbalance. Which ones is drawn by a generator that the data seed starts.

    Validation and test are the task's own, and so is the scaling of the inputs, which the whole training part
    decided. Stored options are left out: they were chosen for other data.

    Args:
        task: A classification.
        imbalance: Samples of the first class for each one of the last.

    Returns:
        The new task, which reports the mean accuracy of the rarest third of the classes beside the task's metrics.

    Raises:
        InvalidOptionError: If the task is no classification or the imbalance is below 1.
        DataError: From `load` of the new task, if there is one class only, or a class without training samples.
    """
    check_real("imbalance", imbalance, low=1)
    if task.kind != "classification":
        raise InvalidOptionError(
            f"task {task.name} is a {task.kind} and a long tail is made of classes: give a classification"
        )

    def load(data_seed: int) -> Splits:
        splits = task.load(data_seed)
        sizes = _sizes(task.name, splits, imbalance)
        return replace(splits, train=_thinned(splits.train, sizes, data_seed))

    return replace(
        task,
        name=_name(task, imbalance),
        description=_description(task, imbalance),
        load=load,
        metrics=(*task.metrics, RARE_ACCURACY),
        options={},
        options_source=None,
    )


def _sizes(name: str, splits: Splits, imbalance: float) -> list[int]:
    classes = splits.shape.outputs
    found = splits.train.targets.bincount(minlength=classes)
    smallest = int(found.min())
    if classes < 2 or smallest == 0:
        what = "there is one class only" if classes < 2 else f"class {int(found.argmin())} has none"
        raise DataError(
            f"the training samples of {name} cannot be long-tailed: {what}; give data with two classes or more, and "
            "training samples of each"
        )
    return [max(1, round(smallest * imbalance ** (-number / (classes - 1)))) for number in range(classes)]


def _thinned(train: Split, sizes: list[int], data_seed: int) -> Split:
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(data_seed))
    drawn = train.targets[order]
    kept = torch.cat([order[drawn == number][:size] for number, size in enumerate(sizes)]).sort().values
    return train.take(kept)


def _name(entry: Task | FileTask, imbalance: float) -> str:
    return f"{entry.name}_lt{imbalance:g}"


def _description(entry: Task | FileTask, imbalance: float) -> str:
    return f"{entry.description}; training classes of falling size, {imbalance:g} to 1"


def _from_files(entry: FileTask, imbalance: float) -> FileTask:
    return replace(
        entry,
        name=_name(entry, imbalance),
        description=_description(entry, imbalance),
        at=lambda folder: long_tailed(entry.at(folder), imbalance),
    )


ENTRIES: list[Task | FileTask] = [
    entry
    for imbalance in (50, 100)
    for entry in (
        long_tailed(DIGITS, imbalance),
        _from_files(FASHION_MNIST_CNN, imbalance),
        _from_files(CIFAR10_RESNET, imbalance),
    )
]
