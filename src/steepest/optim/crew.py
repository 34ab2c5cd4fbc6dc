"""The processes that take one optimizer's steps together: what they must agree on so that none goes on alone."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from steepest._validation import check_choice, check_real
from steepest.distributed.contact import LostRankError
from steepest.distributed.ranks import Ranks
from steepest.distributed.teams import Teams, team_size
from steepest.errors import InvalidOptionError, NonFiniteError

__all__ = ["Crew", "Distribution"]

Distribution = Literal["replicated", "sharded", "hybrid"]
DISTRIBUTIONS = ("replicated", "sharded", "hybrid")


class Crew:
    """One process among those that train a model; alone, it does nothing.

    A step comes in parts between which the ranks exchange something. What fails on one rank is kept until the next
    exchange, where all of them learn of it: so every rank takes part in every exchange, and all fail together.

    Args:
        model: The model as the optimizer got it; DDP has its own group of processes, and averages gradients itself.
        distribution: Who decomposes and who preconditions.
        fraction: Share of the ranks that precondition a layer with "hybrid".

    Raises:
        InvalidOptionError: If the distribution is none, or has no such fraction.
    """

    def __init__(self, model: nn.Module, distribution: Distribution, fraction: float = 1.0) -> None:
        check_choice("distribution", distribution, DISTRIBUTIONS)
        check_real("hybrid_fraction", fraction, low=0, high=1, open_low=True)
        if fraction != 1 and distribution != "hybrid":
            raise InvalidOptionError(
                f"hybrid_fraction={fraction} has no meaning with distribution={distribution!r}: give "
                "distribution='hybrid' with it."
            )
        self.distribution: Distribution = distribution
        self._fraction = fraction
        self.averaged = isinstance(model, DistributedDataParallel)
        self.trouble: Exception | None = None
        self._group: Any = getattr(model, "process_group", None) if self.averaged else None
        self._ranks: Ranks | None = None
        self._compared = False

    @property
    def ranks(self) -> Ranks | None:
        """The ranks, None for a process alone; the same object from step to step, which counts the traffic."""
        found = Ranks.current(self._group)
        if found is None or self._ranks is None:
            self._ranks = found
        return self._ranks

    @property
    def place(self) -> tuple[int, int]:
        """Number of this rank, and how many there are."""
        ranks = self.ranks
        return (0, 1) if ranks is None else (ranks.rank, ranks.size)

    @property
    def workers(self) -> int:
        """How many ranks precondition a layer, next to each other; where these are not all, they tell the others."""
        size = self.place[1]
        if self.distribution == "hybrid":
            return team_size(self._fraction, size)
        return 1 if self.distribution == "sharded" else size

    def teams(self, ranks: Ranks, device: torch.device) -> Teams:
        """The workers of a layer, and whom each of them tells; every rank must come here."""
        return Teams.of(ranks, self.workers, device)

    def begin(self) -> None:
        """Forget the troubles of the last step."""
        self.trouble = None

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Keep what goes wrong inside until the next exchange; alone, it is raised at once."""
        ranks = self.ranks
        try:
            yield
        except Exception as error:
            if ranks is None:
                raise
            self.trouble = self.trouble or error

    def tally(
        self,
        counts: Mapping[str, Sequence[float]],
        alike: Mapping[str, float],
        size: Tensor | None,
        params: Sequence[Tensor],
        *,
        saves: bool = False,
    ) -> dict[str, list[float]]:
        """Open a step: add up what the ranks counted, in one message, and wait for the device once.

        Or come together to save what every rank has a part of, in a message of the same form, so that no rank waits
        for others that take a step meanwhile.

        Args:
            counts: Lists of numbers, as long on every rank.
            alike: What is the same on every rank that trains with the others.
            size: Size of what goes into the step, not finite where that is not.
            params: The trained parameters, compared in the first step.
            saves: Whether this rank saves, and takes no step; the sums then have no meaning.

        Returns:
            The sums.

        Raises:
            RuntimeError: For a process alone.
            InvalidOptionError: If some ranks save while others take a step.
            NonFiniteError: If a size is not finite.
        """
        ranks = self.ranks
        if ranks is None:
            raise RuntimeError("a process alone has nothing to add up")
        slots = [[0.0] * ranks.size for _ in range(2 + len(alike))]
        for slot, value in zip(slots[2:], alike.values(), strict=True):
            slot[ranks.rank] = value
        lists = [[float(self.trouble is not None) + saves * (ranks.size + 1)], *slots, *counts.values()]
        device = params[0].device
        vector = torch.tensor([n for numbers in lists for n in numbers], dtype=torch.float64).to(device)
        if size is not None and self.trouble is None:
            vector[1 + ranks.rank] = size
        if not self._compared and not self.averaged:
            norms = torch._foreach_norm([p.detach() for p in params])
            vector[1 + ranks.size + ranks.rank] = torch.stack([n.double().to(device) for n in norms]).sum()
        ranks.sum_([vector])
        numbers = iter(vector.tolist())
        marks, sizes, starts, *others = [[next(numbers) for _ in given] for given in lists]
        saving, failed = divmod(marks[0], ranks.size + 1)
        if failed:
            ranks.agree(self.trouble)
        if 0 < saving < ranks.size:
            raise InvalidOptionError(
                f"{saving:g} of {ranks.size} ranks called state_dict(), and the others step(): each rank has a part of "
                f"the state with distribution={self.distribution!r}. Parameters and optimizer state are unchanged. "
                "Remedy: call state_dict() on every rank, and write the file on one."
            )
        totals = dict(zip(counts, others[len(alike) :], strict=True))
        if saving:
            return totals
        if not totals["skipped"][0]:
            _refuse_different(dict(zip(alike, others, strict=False)), starts)
            self._compared = True
        lost = [str(rank) for rank, value in enumerate(sizes) if not math.isfinite(value)]
        if lost:
            raise NonFiniteError(
                f"A gradient holds NaN or infinity on rank {', '.join(lost)} of {ranks.size}; parameters and optimizer "
                "state are unchanged on all. Remedy: lower lr, raise damping, clip with kl_clip, or skip such steps "
                "with on_nonfinite='skip'."
            )
        return totals

    def meet_to_save(self, counts: Mapping[str, Sequence[float]], params: Sequence[Tensor]) -> None:
        """Wait until all ranks save, and fail on all where some take a step instead.

        Args:
            counts: As for `tally`.
            params: The trained parameters.

        Raises:
            LostRankError: If the others do not come.
        """
        self.begin()
        try:
            self.tally(counts, {"step": 0, "period": 0}, None, params, saves=True)
        except LostRankError as error:
            raise LostRankError(
                f"{error}. It was in state_dict(), which needs all ranks with distribution={self.distribution!r}. "
                "Remedy: call it on every rank, and write the file on one."
            ) from error

    def verdict(self, numbers: Sequence[Tensor], count: int, device: torch.device) -> list[Tensor]:
        """Close a step: all ranks take the numbers of the first, or fail together.

        Args:
            numbers: 0-dimensional tensors that say what the step will do; ignored where something failed.
            count: How many they are.
            device: Where they are wanted.

        Returns:
            Those of rank 0, float64, not finite where those of any rank are not.

        Raises:
            RuntimeError: For a process alone.
        """
        ranks = self.ranks
        if ranks is None:
            raise RuntimeError("a process alone has nobody to agree with")
        vector = torch.zeros(1 + count, dtype=torch.float64, device=device)
        if self.trouble is not None:
            vector[0] = 1
        else:
            own = torch.stack([number.double().to(device) for number in numbers])
            vector[1:] = own if ranks.rank == 0 else own * 0  # which leaves NaN and infinity visible
        ranks.sum_([vector])
        if bool(vector[0] != 0):
            ranks.agree(self.trouble)
        return list(vector[1:].unbind())


def _refuse_different(alike: Mapping[str, Sequence[float]], starts: Sequence[float]) -> None:
    for name, values in alike.items():
        if len(set(values)) > 1:
            raise InvalidOptionError(
                f"The ranks do not train together: their {name} is {', '.join(f'{value:g}' for value in values)}. "
                "Remedy: give all ranks the same options, and load a saved state on every rank or on none."
            )
    if max(starts) - min(starts) > 1e-6 * max(starts):
        raise InvalidOptionError(
            "The ranks do not begin with the same parameters (sums of their norms: "
            f"{', '.join(f'{start:.9g}' for start in starts)}). Remedy: torch.manual_seed with the same seed before "
            "the model is made, or wrap it in DistributedDataParallel, which copies those of rank 0."
        )
