"""The processes that train together, and what they tell each other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from steepest.distributed.contact import LostRankError, RankError, contact

__all__ = ["LostRankError", "RankError", "Ranks", "Traffic"]

# Tensors of one type travel together, in messages of about this size.
_BUCKET_BYTES = 1 << 25


@dataclass
class Traffic:
    """What one process gave to collectives, in bytes of their tensors; what travels depends on the backend's algorithm.

    Args:
        reduced: Given to sums over all ranks.
        gathered: Given to gathers.
        broadcast: Of broadcasts, counted on every rank.
        calls: Number of collectives, and of exchanges that send.
        sent: Sent to single ranks.
    """

    reduced: int = 0
    gathered: int = 0
    broadcast: int = 0
    calls: int = 0
    sent: int = 0


@dataclass(eq=False)
class Ranks:
    """A process group of `torch.distributed`, seen from one of its processes.

    Args:
        group: The group; None for all processes.
        traffic: What has been given to collectives so far.

    Example:
        >>> Ranks.current() is None  # not started by torchrun
        True
    """

    group: Any = None
    traffic: Traffic = field(default_factory=Traffic)

    @classmethod
    def current(cls, group: Any = None) -> Self | None:
        """The ranks, or None where there is one process alone."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
            return None
        return cls(group)

    @property
    def rank(self) -> int:
        """Number of this process within the group."""
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """Number of processes."""
        return dist.get_world_size(self.group)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over all ranks, in as few messages as their types and sizes allow.

        Args:
            tensors: The same number with the same shapes and types on every rank; contiguous or not.
        """
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            with contact():
                dist.all_reduce(flat, group=self.group)
            self._count("reduced", flat)
            for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def broadcast_(self, tensors: Sequence[Tensor], source: int) -> None:
        """Replace tensors by those of one rank.

        Args:
            tensors: The same number with the same shapes and types on every rank.
            source: Number within the group of the rank that has them.
        """
        sender = source if self.group is None else dist.get_global_rank(self.group, source)
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            with contact():
                dist.broadcast(flat, src=sender, group=self.group)
            self._count("broadcast", flat)
            if source != self.rank:
                for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                    tensor.copy_(part.view_as(tensor))

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, in the order of their numbers.

        Args:
            tensor: Of the same type and shape on every rank but for dimension 0.

        Returns:
            One tensor for each rank.
        """
        lengths = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(self.size)]
        with contact():
            dist.all_gather(lengths, torch.tensor([len(tensor)], device=tensor.device), group=self.group)
        counts = [int(length) for length in lengths]
        # Gathers want one shape: the shorter ones are padded.
        padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        found = [torch.empty_like(padded) for _ in counts]
        with contact():
            dist.all_gather(found, padded, group=self.group)
        self._count("gathered", padded)
        return [part[:count] for part, count in zip(found, counts, strict=True)]

    def exchange(
        self, send: Sequence[Tensor], target: int | None, receive: Sequence[Tensor], source: int | None
    ) -> Callable[[], None]:
        """Send tensors to one rank and receive tensors from one, while the caller does something else.

        Args:
            send: Contiguous tensors.
            target: Number within the group of the rank that receives them with as many of the same shapes and types;
                None to send nothing.
            receive: Contiguous tensors to be overwritten.
            source: Who sends them; None to receive nothing.

        Returns:
            Call it to wait until the tensors are there; until then change neither.
        """
        ends = ((dist.isend, send, target), (dist.irecv, receive, source))
        steps = [
            dist.P2POp(way, tensor, peer if self.group is None else dist.get_global_rank(self.group, peer), self.group)
            for way, tensors, peer in ends
            if peer is not None
            for tensor in tensors
            if tensor.numel()
        ]
        with contact():
            works = dist.batch_isend_irecv(steps) if steps else []
        if target is not None:
            self.traffic.sent += sum(tensor.numel() * tensor.element_size() for tensor in send)
            self.traffic.calls += 1

        def wait() -> None:
            with contact():
                for work in works:
                    work.wait()
            steps.clear()  # what holds the tensors

        return wait

    def gather_objects(self, thing: Any) -> list[Any]:
        """Small Python objects of all ranks, pickled by torch.distributed, in the order of their numbers."""
        found: list[Any] = [None] * self.size
        with contact():
            dist.all_gather_object(found, thing, group=self.group)
        return found

    def agree(self, error: Exception | None) -> None:
        """Let every rank fail where one does, so that none waits for it in a later collective.

        Args:
            error: What went wrong on this rank, or None. Every rank must come here.

        Raises:
            RankError: On the ranks where nothing went wrong, if it did elsewhere; on the others their own error.
        """
        told = self.gather_objects(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        failed = {rank: text for rank, text in enumerate(told) if text is not None}
        if failed:
            rank, text = next(iter(failed.items()))
            raise RankError(f"Rank {rank} of {self.size} failed, so that none goes on. It said: {text}")

    def _count(self, kind: str, tensor: Tensor) -> None:
        setattr(self.traffic, kind, getattr(self.traffic, kind) + tensor.numel() * tensor.element_size())
        self.traffic.calls += 1


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors of one type and device, in order, in groups of some size."""
    buckets: list[list[Tensor]] = []
    open_: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], int]] = {}
    for tensor in tensors:
        key, size = (tensor.dtype, tensor.device), tensor.numel() * tensor.element_size()
        bucket, filled = open_.get(key, ([], _BUCKET_BYTES))
        if filled + size > _BUCKET_BYTES:
            bucket, filled = [], 0
            buckets.append(bucket)
        bucket.append(tensor)
        open_[key] = bucket, filled + size
    return buckets
