"""Tensors of a task: splits by a seeded generator, standardisation, the order of the batches."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from steepest.errors import InvalidOptionError

__all__ = ["Shape", "Split", "Splits", "batches", "epoch_generator", "epoch_order", "split_three_ways", "standardise"]

# Odd, so that (seed, epoch) pairs do not collide for any run one would make.
_EPOCH_STRIDE = 1_000_003


@dataclass(frozen=True)
class Shape:
    """What a model must know of the data.

    Attributes:
        inputs: Shape of one input, without the batch.
        outputs: Numbers that the model puts out per sample: classes, or components of a target.
    """

    inputs: tuple[int, ...]
    outputs: int

    @property
    def features(self) -> int:
        """Numbers in one input."""
        return prod(self.inputs)


@dataclass(frozen=True)
class Split:
    """Inputs and targets of one part of the data, first axis over samples.

    `wrong` marks the samples whose target is known to be wrong, `[N]` of bool; None where nothing is known. No
    training looks at it: it is there to be counted.
    """

    inputs: Tensor
    targets: Tensor
    wrong: Tensor | None = None

    def __len__(self) -> int:
        return self.inputs.shape[0]

    def to(self, device: str) -> "Split":
        """Copy to a device.

        Args:
            device: A torch device, such as "cpu" or "cuda".

        Returns:
            The split on that device.
        """
        wrong = None if self.wrong is None else self.wrong.to(device)
        return Split(self.inputs.to(device), self.targets.to(device), wrong)

    def take(self, index: Tensor) -> "Split":
        """Some of the samples.

        Args:
            index: Their places, in the order that is wanted.

        Returns:
            A split of them.
        """
        return Split(self.inputs[index], self.targets[index], None if self.wrong is None else self.wrong[index])


@dataclass(frozen=True)
class Splits:
    """Training, validation and test data of one task.

    `scaling` holds the means and scales that `standardise` took out of inputs and targets.
    """

    train: Split
    val: Split
    test: Split
    scaling: Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)

    @property
    def shape(self) -> Shape:
        """Shapes of inputs and outputs; targets of whole numbers are classes, counted over all three parts."""
        targets = self.train.targets
        if targets.is_floating_point():
            outputs = prod(targets.shape[1:])
        else:
            outputs = 1 + max(int(part.targets.max()) for part in (self.train, self.val, self.test))
        return Shape(tuple(self.train.inputs.shape[1:]), outputs)

    def to(self, device: str) -> "Splits":
        """Copy all three to a device.

        Args:
            device: A torch device, such as "cpu" or "cuda".

        Returns:
            The splits on that device.
        """
        return Splits(self.train.to(device), self.val.to(device), self.test.to(device), scaling=self.scaling)


def split_three_ways(inputs: Tensor, targets: Tensor, *, seed: int, val: float = 0.2, test: float = 0.2) -> Splits:
    """Shuffle with a generator of its own and cut into train, validation and test.

    Args:
        inputs: `[N, ...]`.
        targets: `[N, ...]`.
        seed: Seed of the shuffle; the same seed gives the same split on every machine.
        val: Fraction kept for validation.
        test: Fraction kept for the test.

    Returns:
        The three parts; together they hold every sample once.

    Raises:
        InvalidOptionError: If a part would be empty.
    """
    total = inputs.shape[0]
    num_val, num_test = int(total * val), int(total * test)
    if min(num_val, num_test, total - num_val - num_test) < 1:
        raise InvalidOptionError(
            f"{total} samples cannot be split with val={val} and test={test}: a part would be empty; "
            "give more samples or other fractions"
        )
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    parts = order[num_val + num_test :], order[:num_val], order[num_val : num_val + num_test]
    return Splits(*(Split(inputs[index], targets[index]) for index in parts))


def standardise(splits: Splits, *, targets: bool = False) -> Splits:
    """Subtract the mean and divide by the standard deviation of the training split.

    Columns that are constant in the training split are only centred.

    Args:
        splits: The parts; validation and test never touch the statistics.
        targets: Whether the targets are standardised too.

    Returns:
        New splits.
    """

    def statistics(reference: Tensor) -> tuple[Tensor, Tensor]:
        mean, scale = reference.mean(dim=0), reference.std(dim=0, correction=0)
        # A constant has the rounding of its mean for a deviation: dividing by that would blow up other parts.
        varies = scale > 8 * torch.finfo(reference.dtype).eps * mean.abs()
        # The value itself and not its rounded mean: a constant becomes zero.
        return torch.where(varies, mean, reference[0]), torch.where(varies, scale, torch.ones_like(scale))

    input_mean, input_scale = statistics(splits.train.inputs)
    scaling = {"input_mean": input_mean, "input_scale": input_scale}
    if targets:
        scaling["target_mean"], scaling["target_scale"] = statistics(splits.train.targets)

    def convert(split: Split) -> Split:
        outputs = (split.targets - scaling["target_mean"]) / scaling["target_scale"] if targets else split.targets
        return Split((split.inputs - input_mean) / input_scale, outputs, split.wrong)

    return Splits(convert(splits.train), convert(splits.val), convert(splits.test), scaling=scaling)


def epoch_order(num_samples: int, *, seed: int, epoch: int) -> Tensor:
    """Order of the samples in one epoch: a function of seed and epoch alone.

    It does not touch torch's global generator, so an optimizer that draws random numbers sees the same
    batches as one that does not.

    Args:
        num_samples: Size of the training split.
        seed: Seed of the run.
        epoch: 1 for the first epoch.

    Returns:
        A permutation of `range(num_samples)`.
    """
    return torch.randperm(num_samples, generator=epoch_generator(seed, epoch))


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """What decides the order of one epoch.

    Args:
        seed: Seed of the run.
        epoch: 1 for the first epoch.

    Returns:
        A generator of its own on the CPU, at its beginning.
    """
    return torch.Generator().manual_seed(seed * _EPOCH_STRIDE + epoch)


def batches(split: Split, *, batch_size: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut one epoch into batches of equal size; the incomplete last one is dropped.

    Args:
        split: The training split.
        batch_size: Samples per batch.
        seed: Seed of the run.
        epoch: 1 for the first epoch.

    Yields:
        Inputs and targets of one batch.
    """
    order = epoch_order(len(split), seed=seed, epoch=epoch).to(split.inputs.device)
    for start in range(0, len(split) - batch_size + 1, batch_size):
        index = order[start : start + batch_size]
        yield split.inputs[index], split.targets[index]
