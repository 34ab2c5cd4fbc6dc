"""Passes of a method over the data: batch by batch, with progress and an estimate."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Literal

import torch

from steepest.errors import InvalidOptionError, SelectionError
from steepest.selection.column import Column
from steepest.selection.estimate import FirstBatches
from steepest.selection.ledger import Ledger
from steepest.selection.meetings import NEVER, Pause
from steepest.selection.method import Run
from steepest.selection.report import Estimate, Progress
from steepest.selection.samples import Batch, Samples, chain, sample_digests
from steepest.selection.scan import FixedModel
from steepest.selection.share import Share
from steepest.selection.standing import Role, Standing
from steepest.selection.together import Together
from steepest.selection.unchanged import Unchanged, digest_of

__all__ = ["Passes", "Role"]

_NO_SAMPLE = "the {} hold no sample: give some."
_TOLD = 0.1  # seconds from one word on a choice to the next: its steps are many and short

_WORDS: dict[Role, str] = {"data": "data", "reference": "reference data"}


class Passes(Standing):
    """One selection going through its data.

    Args:
        run: The method's.
        samples: Samples by role.
        fixed: The model, entered; None for a method without passes, whose data are then only read.
        progress: Told after every batch.
        together: The processes that share the data, each of which has its `Share` of the samples; None for one alone.

    Attributes:
        estimate: What all passes will cost; None before it is known.
    """

    def __init__(
        self,
        run: Run,
        samples: Mapping[Role, Samples | Share],
        fixed: FixedModel | None,
        progress: Callable[[Progress], None] | None,
        together: Together | None = None,
    ) -> None:
        super().__init__(run, samples, fixed, together)
        self._progress = progress
        self._total = run.passes if fixed is not None else 1
        self.estimate: Estimate | None = None
        self._first = FirstBatches(run, samples)
        self._told = -math.inf

    def go(
        self,
        after_batch: Callable[[], None],
        at_length: Callable[[int], object],
        pause: Pause = NEVER,
        *,
        kept: bool = False,
    ) -> None:
        """Go through all passes that are left.

        Args:
            after_batch: Called whenever the state of this process is whole.
            at_length: Called with N when it is known; may refuse.
            pause: What several processes do between two batches, when it is time to.
            kept: Whether the state may be asked for.
        """
        while self._number < self._total:
            role = self.role()
            if kept and self._ledger is not None and not self._run.merges and not self._batch:
                self._start = self._run.state_dict()
            mark = time.monotonic()

            def take(item: tuple[int, Batch], role: Role = role) -> None:
                nonlocal mark
                self._take(role, *item)
                mark = self._clock(mark)
                self._tell()
                after_batch()

            samples = self._samples[role]
            if self._ledger is None or not isinstance(samples, Share):
                for item in enumerate(samples.batches(self._batch), self._batch):
                    take(item)
                self._conclude(role, at_length)
            else:
                self._ledger.together.rounds(samples.numbered(self._batch), take, samples.every, pause)
                with self._ledger.together.undisturbed():
                    self._conclude_together(self._ledger, samples, role, at_length)
            after_batch()

    def _take(self, role: Role, number: int, batch: Batch) -> None:
        rows = self._fixed.rows(batch) if self._fixed is not None else None
        digests = sample_digests(batch)
        digest = digest_of(digests)
        if not self._unchanged.setdefault(role, Unchanged()).agrees(number, digest):
            raise SelectionError(
                f"the {_WORDS[role]} changed between passes: pass {self._number + 1} "
                "saw other values, another order or another number of samples than the one before. Random "
                "augmentation? Give the plain images in a fixed order, and augment in training only."
            )
        chained = self._digest
        if self._ledger is None and not self._fingerprint:
            chained = chain(chained, digests)
        self.whole = False
        if rows is not None:
            self._first.update(self._number, rows)
        if not number and role not in self._firsts:
            self._firsts[role] = digest.hex()
            if rows is not None and role == "data":
                self._losses = rows.losses.cpu()
        if role == "data" and self.num_samples is None and batch.labels is not None:
            self._labels.add(batch.labels)
        if self._ledger is not None:
            self._ledger.add(batch.indices, b"" if self._fingerprint else digests)
        self._digest, self._batch, self._seen = chained, self._batch + 1, self._seen + len(batch.indices)
        self.whole = True

    def _clock(self, mark: float) -> float:
        now = time.monotonic()
        self.seconds += now - mark
        if self._first.add(now - mark):
            self.estimate = self._first.estimate()
            self._tell("estimate", self.estimate.seconds or 0.0)
        return now

    def _tell(self, kind: Literal["estimate", "batch"] = "batch", seconds: float | None = None) -> None:
        if self._progress is None:
            return
        batches = self._samples[self.role()].num_batches
        spent = self.seconds if seconds is None else seconds
        self._progress(Progress(kind, self._number, self._total, self._batch, batches, spent, self.estimate))

    def tell_pick(self, chosen: int, count: int, seconds: float) -> None:
        """Tell how far the choice is, now and then.

        Args:
            chosen: Samples chosen.
            count: Samples to choose.
            seconds: Spent on the choice.
        """
        now = time.monotonic()
        if self._progress is None or (chosen < count and now - self._told < _TOLD):
            return
        self._told = now
        spent = self.seconds + seconds
        self._progress(Progress("pick", self._total, self._total, chosen, count, spent, self.estimate))

    def tell_review(self, batch: int, batches: int | None, seconds: float) -> None:
        """Tell how far the look at the kept samples is.

        Args:
            batch: Batches done.
            batches: Their number, where it is known.
            seconds: Spent on it.
        """
        if self._progress is not None:
            self._progress(Progress("review", self._total, self._total, batch, batches, seconds, self.estimate))

    def _conclude(self, role: Role, at_length: Callable[[int], object]) -> None:
        if not self._seen:
            raise InvalidOptionError(_NO_SAMPLE.format(_WORDS[role]))
        if role == "data" and self.num_samples is None:
            at_length(self._seen)
        self.whole = False
        if self._fixed is not None:
            mark = time.monotonic()
            self._run.end_pass(self._number)
            self.seconds += time.monotonic() - mark
        if role == "data":
            self.num_samples, self._fingerprint = self._seen, self._fingerprint or self._digest
        self._next_pass(role)

    def _conclude_together(
        self, ledger: Ledger, samples: Share, role: Role, at_length: Callable[[int], object]
    ) -> None:
        """Conclude a pass of which this process read a part: afterwards all know the same."""
        mark = time.monotonic()
        first = role == "data" and self.num_samples is None
        total = ledger.meet(self._seen, len(self._labels), check_labels=first)
        with ledger.together.attempt():
            if not total:
                raise InvalidOptionError(_NO_SAMPLE.format(_WORDS[role]))
            samples.conclude(total)
            if first:
                at_length(total)
        self.whole = False
        if first:
            self._fingerprint = ledger.fingerprint()
            if ledger.labelled:
                labels = ledger.together.in_order(self._labels.tensor())
                self._labels = Column(torch.int64)
                self._labels.add(labels)
        if self._before:  # the next pass is shared out in another way
            self._unchanged.setdefault(role, Unchanged()).join(ledger.together)
        if self._fixed is not None:
            self._run.join(self._number, ledger.together)
        self.seconds += time.monotonic() - mark
        if role == "data":
            self.num_samples = total
        ledger.clear()
        samples.leave_out([])
        self._next_pass(role)

    def _next_pass(self, role: Role) -> None:
        self._unchanged.setdefault(role, Unchanged()).seal()
        self._number, self._batch, self._seen, self._digest, self._before = self._number + 1, 0, 0, b"", []
        self._start = None
        self.whole = True
