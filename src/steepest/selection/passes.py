"""Passes of a method over the data: fingerprints, progress, the estimate, and a state to be interrupted in."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from steepest.errors import InvalidOptionError, SelectionError
from steepest.selection.column import Column
from steepest.selection.estimate import FirstBatches
from steepest.selection.ledger import Ledger
from steepest.selection.method import Run
from steepest.selection.report import Estimate, Progress
from steepest.selection.samples import Batch, Samples, chain, sample_digests
from steepest.selection.scan import FixedModel
from steepest.selection.share import Share
from steepest.selection.together import Together

__all__ = ["Passes", "Role"]

_NO_SAMPLE = "the {} hold no sample: give some."
_TOLD = 0.1  # seconds from one word on a choice to the next: its steps are many and short

Role = Literal["data", "reference"]
_WORDS: dict[Role, str] = {"data": "data", "reference": "reference data"}


class Passes:
    """One selection going through its data. `state_dict` is complete whenever ``whole`` is true.

    Args:
        run: The method's.
        samples: Samples by role.
        fixed: The model, entered; None for a method without passes, whose data are then only read.
        progress: Told after every batch.
        together: The processes that share the data, each of which has its `Share` of the samples; None for one alone.

    Attributes:
        whole: Whether the state is that after a whole number of batches.
        seconds: Time spent, that before an interruption included.
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
        self._run, self._samples, self._fixed, self._progress = run, samples, fixed, progress
        self._total = run.passes if fixed is not None else 1
        self.whole = True
        self.seconds = 0.0
        self.estimate: Estimate | None = None
        self._first = FirstBatches(run, samples)
        self._told = -math.inf
        self._number = self._batch = self._seen = 0
        self._digest = b""
        self._digests: dict[str, bytes] = {}  # of finished passes, by role
        self._firsts: dict[str, bytes] = {}  # of their first batches
        self._losses: Tensor | None = None  # of the first batch, to know the loss by
        self._labels = Column(torch.int64)
        self.num_samples: int | None = None
        self._ledger = None if together is None else Ledger(together)

    @property
    def fingerprint(self) -> str:
        """Hash of the data; known after the first pass over them."""
        return (self._digests["data"] if self._ledger is None else self._ledger.fingerprint).hex()

    @property
    def labels(self) -> Tensor | None:
        """Labels of all samples, ``[N]``; known after the first pass over the data."""
        return self._labels.tensor() if len(self._labels) else None

    @property
    def alone(self) -> bool:
        """Whether one process reads all."""
        return self._ledger is None

    @property
    def place(self) -> tuple[int, int]:
        """Passes that are done, and batches of the next one."""
        return self._number, self._batch

    def go(
        self,
        after_batch: Callable[[], None],
        at_length: Callable[[int], object],
        after_pass: Callable[[], None] | None = None,
    ) -> None:
        """Go through all passes that are left.

        Args:
            after_batch: Called whenever the state is whole.
            at_length: Called with N when it is known; may refuse.
            after_pass: Called after every pass.
        """
        while self._number < self._total:
            role = self._role()
            mark = time.monotonic()

            def take(batch: Batch, role: Role = role) -> None:
                nonlocal mark
                self._take(role, batch)
                mark = self._clock(mark)
                self._tell()
                after_batch()

            samples = self._samples[role]
            if self._ledger is None or not isinstance(samples, Share):
                for batch in samples.batches(self._batch):
                    take(batch)
                self._conclude(role, at_length)
            else:
                self._ledger.together.rounds(samples.batches(self._batch), take, samples.every)
                self._conclude_together(self._ledger, samples, role, at_length)
            after_batch()
            if after_pass is not None:
                after_pass()

    def _role(self) -> Role:
        return self._run.reads(self._number) if self._run.passes else "data"

    def _take(self, role: Role, batch: Batch) -> None:
        rows = self._fixed.rows(batch) if self._fixed is not None else None
        digests = sample_digests(batch)
        digest = chain(self._digest, digests)
        self.whole = False
        if rows is not None:
            self._first.update(self._number, rows)
        if not self._batch and role not in self._firsts:
            self._firsts[role] = digest
            if rows is not None and role == "data":
                self._losses = rows.losses.cpu()
        if role == "data" and self.num_samples is None:
            self._keep_labels(batch)
        if self._ledger is not None:
            self._ledger.add(batch.indices, digests)
        self._digest, self._batch, self._seen = digest, self._batch + 1, self._seen + len(batch.indices)
        self.whole = True

    def _keep_labels(self, batch: Batch) -> None:
        if batch.labels is not None:
            self._labels.add(batch.labels)

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
        batches = self._samples[self._role()].num_batches
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
        self._check_unchanged(role)
        if role == "data" and self.num_samples is None:
            at_length(self._seen)
        self.whole = False
        if self._fixed is not None:
            mark = time.monotonic()
            self._run.end_pass(self._number)
            self.seconds += time.monotonic() - mark
        if role == "data":
            self.num_samples = self._seen
        self._next_pass(role)

    def _conclude_together(
        self, ledger: Ledger, samples: Share, role: Role, at_length: Callable[[int], object]
    ) -> None:
        """Conclude a pass of which this process read a part: afterwards all know the same."""
        mark = time.monotonic()
        with ledger.together.attempt():
            self._check_unchanged(role)
        total = ledger.meet(self._seen, len(self._labels), check_labels=role == "data" and self.num_samples is None)
        with ledger.together.attempt():
            if not total:
                raise InvalidOptionError(_NO_SAMPLE.format(_WORDS[role]))
            samples.conclude(total)
            if role == "data" and self.num_samples is None:
                at_length(total)
        self.whole = False
        if role == "data" and self.num_samples is None:
            ledger.join_digests()
            if ledger.labelled:
                labels = ledger.together.in_order(self._labels.tensor())
                self._labels = Column(torch.int64)
                self._labels.add(labels)
        if self._fixed is not None:
            self._run.join(self._number, ledger.together)
        self.seconds += time.monotonic() - mark
        if role == "data":
            self.num_samples = total
        ledger.clear()
        self._next_pass(role)

    def _check_unchanged(self, role: Role) -> None:
        if self._digests.get(role, self._digest) != self._digest:
            raise SelectionError(
                f"the {_WORDS[role]} changed between passes: pass {self._number + 1} "
                "saw other values, another order or another number of samples than the one before. Random "
                "augmentation? Give the plain images in a fixed order, and augment in training only."
            )

    def _next_pass(self, role: Role) -> None:
        self._digests[role] = self._digest
        self._number, self._batch, self._seen, self._digest = self._number + 1, 0, 0, b""
        self.whole = True

    def state_dict(self) -> dict[str, Any]:
        """Return where the selection is.

        Returns:
            Tensors and plain values.
        """
        return {
            "run": self._run.state_dict(),
            "number": self._number,
            "batch": self._batch,
            "seen": self._seen,
            "num_samples": self.num_samples,
            "digest": self._digest.hex(),
            "digests": {role: digest.hex() for role, digest in self._digests.items()},
            "firsts": {role: digest.hex() for role, digest in self._firsts.items()},
            "losses": self._losses,
            "labels": self.labels,
            "seconds": self.seconds,
            **({} if self._ledger is None else {"ledger": self._ledger.state_dict()}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a state, after a look at the first batch of the data.

        Args:
            state: What `state_dict` gave.
        """
        self._check_first(state)
        self._take_over(state)

    def _take_over(self, state: Mapping[str, Any]) -> None:
        self._run.load_state_dict(state["run"])
        self._number, self._batch, self._seen = state["number"], state["batch"], state["seen"]
        self.num_samples, self.seconds = state["num_samples"], state["seconds"]
        self._digest = bytes.fromhex(state["digest"])
        self._digests = {role: bytes.fromhex(digest) for role, digest in state["digests"].items()}
        self._firsts = {role: bytes.fromhex(digest) for role, digest in state["firsts"].items()}
        self._losses = state["losses"]
        self._labels = Column(torch.int64)
        if state["labels"] is not None:
            self._labels.add(state["labels"])
        if self._ledger is not None:
            self._ledger.load_state_dict(state["ledger"])

    def follow(self, state: Mapping[str, Any]) -> None:
        """Go to the end of a pass that another process has noted and this one has not.

        Args:
            state: What `state_dict` gave there, right after a pass. What that process read itself is left out: the
                next pass does not see whether what this one reads has changed since.
        """
        firsts, losses = self._firsts, self._losses
        self._take_over({**state, "digests": {}})
        self._firsts, self._losses = firsts, losses

    def _check_first(self, state: Mapping[str, Any]) -> None:
        """The rest of the data shows in the hash of the next whole pass, and at the latest in `Selection.subset`."""
        roles: tuple[Role, Role] = ("data", "reference")
        for role in roles:
            if role not in state["firsts"]:
                continue
            batch = next(iter(self._samples[role].batches()), None)
            if batch is None or chain(b"", sample_digests(batch)).hex() != state["firsts"][role]:
                raise SelectionError(
                    f"its {role} {'were' if role == 'data' else 'set was'} another: the first batch differs"
                )
            if role == "data" and self._fixed is not None and state["losses"] is not None:
                losses = self._fixed.rows(batch).losses.cpu()
                if losses.shape != state["losses"].shape or not torch.allclose(losses, state["losses"], 1e-4, 1e-6):
                    raise SelectionError("its loss function was another: the losses of the first batch differ")
