"""Subsets of a training split, and epochs on them that are as long as those on everything."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from steepest.training.data import Split, epoch_generator

__all__ = ["Subset", "subset_batches", "subset_order"]


@dataclass(frozen=True, eq=False)
class Subset:
    """Samples of a training split that are trained on instead of all.

    Attributes:
        indices: Their places, `[k]`, int64 on the CPU.
        weights: How often each is to be drawn beside the others, `[k]`.
    """

    indices: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.indices)


def subset_order(subset: Subset, draws: int, *, seed: int, epoch: int) -> Tensor:
    """Samples of a subset in the order of one epoch: a function of seed and epoch alone, as `epoch_order` is.

    The subset is gone through again and again, in a new order each time, so that no sample is drawn more than once
    more often than another. Where weights differ, samples are drawn with replacement, in proportion to them.

    Args:
        subset: What is trained on.
        draws: Length of the epoch in samples.
        seed: Seed of the run.
        epoch: 1 for the first epoch.

    Returns:
        Places in the training split, `[draws]`.

    Example:
        >>> thirds = Subset(torch.tensor([2, 5, 7]), torch.ones(3))
        >>> subset_order(thirds, 6, seed=0, epoch=1).bincount(minlength=8).tolist()
        [0, 0, 2, 0, 0, 2, 0, 2]
    """
    generator = epoch_generator(seed, epoch)
    size, weights = len(subset), subset.weights
    if bool((weights == weights[0]).all()):
        passes = [torch.randperm(size, generator=generator) for _ in range(-(-draws // size))]
        return subset.indices[torch.cat(passes)[:draws]]
    return subset.indices[torch.multinomial(weights.double(), draws, replacement=True, generator=generator)]


def subset_batches(
    split: Split, subset: Subset, *, batch_size: int, seed: int, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """As many batches as an epoch of the whole split has, from a subset of it.

    Args:
        split: The training split.
        subset: What is trained on.
        batch_size: Samples per batch.
        seed: Seed of the run.
        epoch: 1 for the first epoch.

    Yields:
        Inputs and targets of one batch.
    """
    steps = len(split) // batch_size
    order = subset_order(subset, steps * batch_size, seed=seed, epoch=epoch).to(split.inputs.device)
    for index in order.split(batch_size):
        yield split.inputs[index], split.targets[index]
