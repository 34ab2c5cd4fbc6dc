"""Processes that make one selection together, and what they tell each other."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from steepest.distributed.alone import OneRank
from steepest.distributed.ranks import Ranks
from steepest.errors import SelectionError
from steepest.selection.meetings import Meetings

__all__ = ["Together", "attempt"]

T = TypeVar("T")


class Together(Meetings):
    """The processes of one selection, seen from one of them.

    What fails on one fails on all: work that only concerns one process goes inside `attempt`, or through `rounds`,
    and collectives stand outside of them.

    Args:
        ranks: The processes.

    Attributes:
        positions: Of the samples that every process read in the pass that ends, as `meet` found them.
    """

    def __init__(self, ranks: Ranks) -> None:
        super().__init__(ranks)
        self.positions: list[Tensor] = []
        # NCCL alone takes nothing that lies in main memory, and others take everything that does.
        config = "" if isinstance(ranks, OneRank) else dist.get_backend_config(ranks.group)
        self._device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in config else torch.device("cpu")

    @property
    def traffic(self) -> int:
        """Bytes that this process gave to collectives so far."""
        traffic = self.ranks.traffic
        return traffic.reduced + traffic.gathered + traffic.broadcast + traffic.sent

    def told(self, thing: T) -> list[T]:
        """What every process says, small and picklable."""
        return self.ranks.gather_objects(thing)

    def one(self, thing: T | None) -> T:
        """What the first process says."""
        found: T = self.ranks.gather_objects(thing if self.leads else None)[0]
        return found

    def alike(self, mine: Mapping[str, Any]) -> None:
        """Refuse processes that were given different things.

        Args:
            mine: What this one was given, in plain values.

        Raises:
            SelectionError: On every process alike, with the first thing that differs.
        """
        told = self.told(dict(mine))
        for rank, other in enumerate(told):
            for name, value in told[0].items():
                if other.get(name) != value:
                    raise SelectionError(
                        f"the processes were given different things: {name} is {value!r} on rank 0 and "
                        f"{other.get(name)!r} on rank {rank}. Give all the same, or select in one process alone with "
                        "alone=True."
                    )

    def meet(self, positions: Tensor) -> None:
        """Tell each other which samples were read, at the end of a pass.

        Args:
            positions: ``[n]``, int64: the samples that this process read, in the order in which it did.

        Raises:
            SelectionError: If these are not all samples, each read once.
        """
        self.positions = self.gather(positions)
        found = torch.cat(self.positions).sort().values
        if not torch.equal(found, torch.arange(len(found), device="cpu")):
            raise SelectionError(
                "the processes read different data: some samples were read twice or not at all. Give every process "
                "the same data."
            )

    def in_order(self, rows: Tensor) -> Tensor:
        """Join what every process has of its own samples.

        Args:
            rows: ``[n, ...]`` on the CPU, one row for each sample, in the order in which this process read them; of
                one type and width everywhere.

        Returns:
            ``[N, ...]``, in the data's own order.
        """
        parts = self.gather(rows)
        out = rows.new_empty(sum(map(len, parts)), *rows.shape[1:])
        for positions, part in zip(self.positions, parts, strict=True):
            out[positions] = part
        return out

    def gather(self, rows: Tensor) -> list[Tensor]:
        """Rows of all processes, on the CPU."""
        return [part.cpu() for part in self.ranks.gather(rows.to(self._device))]

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over all processes."""
        there = [tensor.to(self._device) for tensor in tensors]
        self.ranks.sum_(there)
        for tensor, total in zip(tensors, there, strict=True):
            tensor.copy_(total)

    def from_first_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by those of the first process."""
        there = [tensor.to(self._device) for tensor in tensors]
        self.ranks.broadcast_(there, source=0)
        for tensor, given in zip(tensors, there, strict=True):
            tensor.copy_(given)

    def to_first(self, tensors: Sequence[Tensor], source: int) -> list[Tensor]:
        """Send tensors from one process to the first; both must call it, the others need not.

        Args:
            tensors: On the sender what is sent, on the first process tensors of the same shapes.
            source: Number of the sender.

        Returns:
            What was sent, on the first process.
        """
        there = [tensor.to(self._device).contiguous() for tensor in tensors]
        if self.leads:
            self.ranks.exchange([], None, there, source)()
        else:
            self.ranks.exchange(there, 0, [], None)()
        return there


def attempt(together: Together | None) -> AbstractContextManager[None]:
    """`Together.attempt`, or nothing where there is one process.

    Args:
        together: The processes, or None.

    Returns:
        A context.
    """
    return nullcontext() if together is None else together.attempt()
