"""Tasks for transformers, each with softmax-free attention and with softmax attention, alike in all else.

Images are seen in patches, or as sequences of all their numbers, 784 or 3,072 tokens. The sequences come with few
images, so that a run takes minutes on a CPU: softmax attention compares each token with each.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import nn

from steepest.nn.transformer import Attention
from steepest.training.data import Shape, Split, Splits
from steepest.training.models import pixels, vit
from steepest.training.task import FileTask, Task
from steepest.training.tasks.bundled import DIGITS
from steepest.training.tasks.images import CIFAR10_RESNET, FASHION_MNIST_CNN
from steepest.training.tuned import rates, tuned_rates

__all__ = ["ENTRIES"]

# The best of 5 rates for each.
_DIGITS_RATES: dict[Attention, Mapping[str, Mapping[str, object]]] = {
    "softmax_free": rates(adamw=0.00949, lpsgdm=0.01, kfac=0.0949, fop=0.0949, sven=1.0),
    "softmax": rates(adamw=0.00949, lpsgdm=0.01, kfac=0.00949, fop=0.00949, sven=1.0),
}
# Images of the sequences: for training, and for validation and test each.
_TRAINED, _HELD_OUT = 5_000, 1_000


def _as_they_are(splits: Splits) -> Splits:
    return splits


def _as_images(splits: Splits) -> Splits:
    """The digits, which come as rows of 64 numbers."""
    return _each(splits, lambda part: replace(part, inputs=part.inputs.unflatten(1, (1, 8, 8))))


def _few(splits: Splits) -> Splits:
    """The first images of each part; those for training and validation are in random order already."""

    def first(part: Split) -> Split:
        count = _TRAINED if part is splits.train else _HELD_OUT
        return part.take(torch.arange(min(count, len(part))))

    return _each(splits, first)


def _each(splits: Splits, change: Callable[[Split], Split]) -> Splits:
    return replace(splits, train=change(splits.train), val=change(splits.val), test=change(splits.test))


def _variant(
    entry: Task | FileTask,
    name: str,
    network: str,
    model: Callable[[Shape], nn.Module],
    *,
    batch_size: int,
    epochs: int,
    change: Callable[[Splits], Splits] = _as_they_are,
    data: str | None = None,
    options: Mapping[str, Mapping[str, object]] | None = None,
) -> Task | FileTask:
    """A task with another model, and its data changed; its stored options are not for this one."""
    # What comes before the first semicolon is about the data.
    description = f"{data or entry.description.partition(';')[0]}; {network}"

    def changed(task: Task) -> Task:
        return replace(
            task,
            name=name,
            description=description,
            load=lambda data_seed: change(task.load(data_seed)),
            model=model,
            batch_size=batch_size,
            epochs=epochs,
            options=options or {},
            options_source=tuned_rates(5) if options else None,
        )

    if isinstance(entry, Task):
        return changed(entry)
    return replace(entry, name=name, description=description, at=lambda folder: changed(entry.at(folder)))


def _entries(attention: Attention, words: str, vit_name: str, pixels_name: str) -> list[Task | FileTask]:
    network = f"transformer, {words}"
    few = f"{_TRAINED:,} training images as sequences of"
    return [
        _variant(
            DIGITS,
            f"digits_{vit_name}",
            network,
            vit(32, 2, attention=attention),
            batch_size=64,
            epochs=20,
            change=_as_images,
            options=_DIGITS_RATES[attention],
        ),
        _variant(
            FASHION_MNIST_CNN,
            f"fashion_mnist_{vit_name}",
            network,
            vit(48, 2, attention=attention),
            batch_size=128,
            epochs=10,
        ),
        _variant(
            CIFAR10_RESNET,
            f"cifar10_{vit_name}",
            network,
            vit(48, 2, attention=attention),
            batch_size=128,
            epochs=10,
        ),
        _variant(
            FASHION_MNIST_CNN,
            f"fashion_mnist_{pixels_name}",
            network,
            pixels(32, 2, attention=attention),
            batch_size=32,
            epochs=4,
            change=_few,
            data=f"{few} 784 pixels, 10 classes of clothing",
        ),
        _variant(
            CIFAR10_RESNET,
            f"cifar10_{pixels_name}",
            network,
            pixels(16, 2, attention=attention),
            batch_size=32,
            epochs=4,
            change=_few,
            data=f"{few} 3,072 numbers, 10 classes of colour images",
        ),
    ]


ENTRIES: list[Task | FileTask] = [
    *_entries("softmax_free", "softmax-free attention", "soft", "pixels_soft"),
    *_entries("softmax", "softmax attention", "vit", "pixels"),
]
