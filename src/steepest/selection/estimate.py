"""What a selection will take, foretold from its first batches."""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from steepest.selection.method import Rows, Run
from steepest.selection.report import Estimate
from steepest.selection.samples import Samples
from steepest.selection.share import Share

__all__ = ["FirstBatches"]

_TIMED = 4  # batches after which the estimate is made; the first one is left out, it warms up


class FirstBatches:
    """Times the first batches of a selection: what every pass does with one, and what the method does.

    Args:
        run: The method's.
        samples: Samples by role.
    """

    def __init__(self, run: Run, samples: Mapping[Literal["data", "reference"], Samples | Share]) -> None:
        self._run, self._samples = run, samples
        self._others: list[float] = []  # seconds of a batch without the update
        self._updates: list[float] = []  # seconds of the update, as if in the first pass
        self._update = 0.0

    def update(self, number: int, rows: Rows) -> None:
        """Give the method a batch.

        Args:
            number: The pass.
            rows: The batch.
        """
        if len(self._others) >= _TIMED:
            self._run.update(number, rows)
            return
        _wait_for(rows)
        mark = time.monotonic()
        self._run.update(number, rows)
        _wait_for(rows)
        self._update = time.monotonic() - mark
        self._updates.append(self._update / self._run.effort(number))

    def add(self, seconds: float) -> bool:
        """Note a batch that is done.

        Args:
            seconds: What it took in all.

        Returns:
            Whether this was the batch after which the estimate can be made.
        """
        if len(self._others) >= _TIMED:
            return False
        self._others.append(max(0.0, seconds - self._update))
        batches = self._samples["data"].num_batches
        return len(self._others) == min(_TIMED, max(2, batches or _TIMED))

    def estimate(self) -> Estimate:
        """Foretell.

        Returns:
            The estimate.
        """
        roles = [self._run.reads(number) for number in range(self._run.passes)]
        batches = [self._samples[role].num_batches for role in roles or ["data"]]
        known = [number for number in batches if number is not None]
        seconds = self._seconds(known) if len(known) == len(batches) else None
        return Estimate(
            self._samples["data"].num_samples, self._run.passes, seconds, getattr(self._run, "nbytes", None)
        )

    def _seconds(self, batches: Sequence[int]) -> float:
        other = statistics.median(self._others[1:])
        if not self._updates:  # a method without passes: its data are only read
            return other * sum(batches)
        update = statistics.median(self._updates[1:])
        return sum(amount * (other + self._run.effort(number) * update) for number, amount in enumerate(batches))


def _wait_for(rows: Rows) -> None:
    """Wait for the device, or its work would be counted to whatever waits next."""
    if rows.losses.is_cuda:
        torch.cuda.synchronize(rows.losses.device)
