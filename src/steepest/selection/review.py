"""A look at what was kept: how alike its gradients are, and how many samples it holds twice."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from steepest.engine import Jacobian
from steepest.selection.content import DIGEST
from steepest.selection.joining import add_sums
from steepest.selection.samples import Batch, Samples, sample_keys
from steepest.selection.scan import FixedModel
from steepest.selection.share import Share
from steepest.selection.together import Together

__all__ = ["Review", "review"]


@dataclass(frozen=True)
class Review:
    """What a look at the kept samples found.

    Args:
        seconds: Time that it took.
        mean_cosine: Mean cosine between the gradients of two kept samples; None where there are no two.
        duplicates: Kept samples whose input is that of a kept sample before.
    """

    seconds: float
    mean_cosine: float | None
    duplicates: int


def review(
    data: Any,
    samples: Samples | Share,
    indices: Tensor,
    fixed: FixedModel | None,
    tell: Callable[[int, int | None, float], None],
    together: Together | None = None,
) -> Review:
    """Go through the kept samples once; of a stream through all, leaving out batches without any.

    The mean cosine is exact and needs no pair: of k unit vectors that add up to s it is
    ``(|s|^2 - k) / (k (k - 1))``.

    Args:
        data: What was chosen from, as the user gave it.
        samples: The same, by batches.
        indices: ``[k]``, the kept positions, ascending.
        fixed: The model, entered; None leaves gradients out.
        tell: Told batches done, their number where it is known, and seconds, after every batch.
        together: The processes that share the work; None for one alone.

    Returns:
        What was found.
    """
    began = time.monotonic()
    seen: set[bytes] = set()
    directions = _Directions()
    few = _by_position(data, samples, indices)
    source: Samples | Share = few or samples
    if few is not None and together is not None:
        source = Share(few, together.ranks.rank, together.ranks.size)
    mask: Tensor | None = None
    if few is None:
        mask = torch.zeros(int(indices.max()) + 1, dtype=torch.bool, device="cpu")
        mask[indices] = True
    number = 0

    def take(batch: Batch) -> None:
        nonlocal number
        kept = torch.ones_like(batch.indices, dtype=torch.bool) if mask is None else _within(mask, batch.indices)
        if kept.any():
            seen.update(key for key, keep in zip(sample_keys(batch), kept.tolist(), strict=True) if keep)
            if fixed is not None:
                directions.add(fixed.rows(batch).jacobian, kept)
        number += 1
        tell(number, source.num_batches, time.monotonic() - began)

    if together is None or not isinstance(source, Share):
        for batch in source.batches():
            take(batch)
    else:
        together.rounds(source.batches(), take, source.every)
        seen = _union(seen, together)
        directions.join(together)
    return Review(time.monotonic() - began, directions.mean_cosine(), len(indices) - len(seen))


def _within(mask: Tensor, positions: Tensor) -> Tensor:
    """Which positions are kept; there may be some beyond the last kept one."""
    return (positions < len(mask)) & mask[positions.clamp_max(len(mask) - 1)]


def _union(keys: set[bytes], together: Together) -> set[bytes]:
    """Keys of all processes."""
    mine = torch.frombuffer(bytearray(b"".join(sorted(keys))), dtype=torch.uint8) if keys else torch.zeros(0)
    parts = together.gather(mine.to(torch.uint8).view(-1, DIGEST))
    return {row.tobytes() for part in parts for row in part.numpy()}


def _by_position(data: Any, samples: Samples | Share, indices: Tensor) -> Samples | None:
    """The kept samples alone, read as all of them were; None where they cannot be asked for by position."""
    dataset = samples.dataset
    by_position = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and samples.batch_size is not None
    if not by_position or isinstance(dataset, IterableDataset):
        return None
    kept: Dataset[Any] = Subset(dataset, indices.tolist())
    if not isinstance(data, DataLoader):
        return Samples(kept, batch_size=samples.batch_size)
    workers: dict[str, Any] = {}
    if data.num_workers > 0:
        names = ("num_workers", "worker_init_fn", "multiprocessing_context", "timeout", "prefetch_factor")
        workers = {name: getattr(data, name) for name in names}
    return Samples(DataLoader(kept, batch_size=samples.batch_size, collate_fn=data.collate_fn, **workers))


class _Directions:
    """Sum of unit gradients, in float64: one vector of the scope's size."""

    def __init__(self) -> None:
        self._sum: dict[str, Tensor] = {}
        self._count = 0

    def add(self, jacobian: Jacobian, kept: Tensor) -> None:
        lengths = jacobian.squared_norms().sqrt()
        used = (lengths > 0) & kept.to(lengths.device)
        weights = torch.where(used, lengths.clamp_min(torch.finfo(lengths.dtype).tiny).reciprocal(), 0.0)
        self._count += int(used.sum())
        for name, part in jacobian.vjp(weights.to(jacobian.dtype)).items():
            self._sum[name] = self._sum[name].add_(part) if name in self._sum else part.double()

    def join(self, together: Together) -> None:
        """Add up what all processes have, on the first; it tells the others what follows from it."""
        held = next((part.device for part in self._sum.values()), None)
        sums = {name: part.reshape(-1) for name, part in self._sum.items()}
        self._sum = add_sums({0: sums} if sums else {}, together, held).get(0, {})
        self._count = sum(together.told(self._count))

    def mean_cosine(self) -> float | None:
        """Zero gradients have no direction and are left out."""
        k = self._count
        if k < 2:
            return None
        squared = sum(float(part.square().sum()) for part in self._sum.values())
        return (squared - k) / (k * (k - 1))
