"""Where a selection stands in its data: what all processes know, what each has read, and how others go on from it."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from steepest.distributed.alone import OneRank
from steepest.errors import SelectionError
from steepest.selection.column import Column
from steepest.selection.ledger import Ledger
from steepest.selection.method import Run
from steepest.selection.samples import Samples, sample_digests
from steepest.selection.scan import FixedModel
from steepest.selection.share import Share
from steepest.selection.spans import Spans, joined, read_by
from steepest.selection.together import Together
from steepest.selection.unchanged import Unchanged, digest_of

__all__ = ["Role", "Standing"]

Role = Literal["data", "reference"]
_ROLES: tuple[Role, Role] = ("data", "reference")


class Standing:
    """The books of a selection under way, of one process.

    Args:
        run: The method's.
        samples: Samples by role.
        fixed: The model, entered; None for a method without passes.
        together: The processes that share the data; None for one alone.

    Attributes:
        whole: Whether they are those after a whole number of batches.
        seconds: Time spent, that before an interruption included.
        num_samples: Number of all samples; known after the first pass over the data.
    """

    def __init__(
        self,
        run: Run,
        samples: Mapping[Role, Samples | Share],
        fixed: FixedModel | None,
        together: Together | None,
    ) -> None:
        self._run, self._samples, self._fixed = run, samples, fixed
        self._rank, self._size = (0, 1) if together is None else (together.ranks.rank, together.ranks.size)
        self._ledger = None if together is None else Ledger(together)
        self.whole = True
        self.seconds = 0.0
        self.num_samples: int | None = None
        self._number = self._batch = self._seen = 0
        self._before: Spans = []  # batches that others had read when the rest of the pass was shared out
        self._digest = b""  # chained so far, by one process alone
        self._fingerprint = b""
        self._labels = Column(torch.int64)
        self._unchanged: dict[str, Unchanged] = {}  # by role
        self._firsts: dict[str, str] = {}  # digests of the first batches, by role
        self._losses: Tensor | None = None  # of the first batch, to know the loss by
        self._start: dict[str, Any] | None = None  # the run at the beginning of the pass, if it does not merge

    @property
    def fingerprint(self) -> str:
        """Hash of the data; known after the first pass over them."""
        return self._fingerprint.hex()

    @property
    def labels(self) -> Tensor | None:
        """Labels of all samples, ``[N]``; known after the first pass over the data."""
        return self._labels.tensor() if len(self._labels) else None

    @property
    def alone(self) -> bool:
        """Whether one process reads all."""
        return self._size == 1

    @property
    def place(self) -> tuple[int, int]:
        """Passes that are done, and batches of the next one."""
        return self._number, self._batch

    @property
    def begun(self) -> bool:
        """Whether a batch of the next pass was read, by this process or before it went on."""
        return self._batch > 0 or bool(self._before)

    def role(self) -> Role:
        """What the pass goes through."""
        return self._run.reads(self._number) if self._run.passes else "data"

    def parts(self, begun: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return where the selection is.

        Args:
            begun: Whether any process has read a batch of the pass.

        Returns:
            What all know, and what this process alone has read and learnt in the pass; tensors and plain values.
        """
        positions = torch.arange(self._seen, device="cpu") if self._ledger is None else self._ledger.positions
        run, own = self._run.divided(self._number, positions) if begun else (self._run.state_dict(), {})
        first, chained = (0, b"") if self._ledger is None else self._ledger.begun
        common = {
            "number": self._number,
            "num_samples": self.num_samples,
            "fingerprint": self.fingerprint,
            "firsts": dict(self._firsts),
            "losses": self._losses,
            "labels": None if self.num_samples is None else self.labels,
            "labelled": self._ledger is not None and self._ledger.labelled,
            "before": self._before,
            "begun": [first, chained.hex()],
            "start": self._start,
            "run": run,
        }
        share = {
            "batch": self._batch,
            "seen": self._seen,
            "seconds": self.seconds,
            "unchanged": {role: known.state() for role, known in self._unchanged.items()},
            "digest": self._digest.hex(),
            "labels": self.labels if self.num_samples is None else None,
            "run": own,
            **({"positions": None, "digests": None} if self._ledger is None else self._ledger.state()),
        }
        return common, share

    def mine(self, size: int) -> list[int]:
        """Whose part of a pass this process goes on with.

        Args:
            size: How many processes there were.

        Returns:
            Their numbers; the merging of sketches follows their order.
        """
        return [rank for rank in range(size) if rank * self._size // size == self._rank]

    def take_over(self, common: Mapping[str, Any], shares: Sequence[Mapping[str, Any]]) -> bool:
        """Go on from where some processes were, after a look at the first batch of the data.

        Args:
            common: What all of them knew.
            shares: What each of them had read; complete for those that are `mine`, of the others what they had read.

        Returns:
            Whether the pass under way goes on; else it is begun anew, because the method does not merge.

        Raises:
            SelectionError: If the data or the loss were others.
        """
        self._check_first(common)
        self._number, self.num_samples = common["number"], common["num_samples"]
        self._fingerprint = bytes.fromhex(common["fingerprint"])
        self._firsts, self._losses, self._start = dict(common["firsts"]), common["losses"], common["start"]
        self._unchanged = {role: Unchanged.of([share["unchanged"] for share in shares], role) for role in _ROLES}
        own = [shares[rank] for rank in self.mine(len(shares))]
        self.seconds = max(share["seconds"] for share in own or shares)
        self._labels = Column(torch.int64)
        for labels in [common["labels"], *(share["labels"] for share in own)]:
            if labels is not None:
                self._labels.add(labels)
        as_before = len(shares) == self._size
        begun = bool(common["before"]) or any(share["batch"] for share in shares)
        # One that goes on with what several have begun keeps their books.
        if self._size == 1 and begun and not (as_before and own[0]["positions"] is None):
            self._keep_books()
        if self._ledger is not None:
            self._ledger.labelled = common["labelled"]
        if not begun:
            self._run.load_state_dict(common["run"])
            return True
        if not as_before and not self._run.merges:
            self._begin_anew(common)
            return False
        self._go_on(common, shares, own, as_before=as_before)
        return True

    def _go_on(
        self,
        common: Mapping[str, Any],
        shares: Sequence[Mapping[str, Any]],
        own: Sequence[Mapping[str, Any]],
        *,
        as_before: bool,
    ) -> None:
        """Go on in the midst of a pass; by another number of processes, its rest is shared out anew."""
        self._before = joined(common["before"])
        if as_before:
            self._batch, self._digest = own[0]["batch"], bytes.fromhex(own[0]["digest"])
        else:
            samples = self._samples[self.role()]
            total = samples.total if isinstance(samples, Share) else samples.num_batches
            read = (
                span
                for rank, share in enumerate(shares)
                for span in read_by(rank, len(shares), share["batch"], total, self._before)
            )
            self._before = joined([*self._before, *read])
        self._seen = sum(share["seen"] for share in own)
        samples = self._samples[self.role()]
        if isinstance(samples, Share):
            samples.leave_out(self._before)
        positions = [share["positions"] for share in own]
        if self._ledger is not None:
            self._ledger.take_over(own, digests=not self._fingerprint)
            first, chained = common["begun"]
            alone = next((share for share in shares if share["positions"] is None), None)
            self._ledger.begun = (
                (first, bytes.fromhex(chained)) if alone is None else (alone["seen"], bytes.fromhex(alone["digest"]))
            )
        read_ = [
            torch.arange(share["seen"], device="cpu") if where is None else where
            for where, share in zip(positions, own, strict=True)
        ]
        self._run.resume(
            self._number, common["run"], [(share["run"], where) for share, where in zip(own, read_, strict=True)]
        )

    def _begin_anew(self, common: Mapping[str, Any]) -> None:
        """Go back to the end of the pass before."""
        if common["start"] is not None:
            self._run.load_state_dict(common["start"])
        if self.num_samples is None:
            self._labels = Column(torch.int64)
        role = self.role()
        if not self._fingerprint or role == "reference":  # read for the first time
            self._unchanged.pop(role, None)

    def _keep_books(self) -> None:
        together = Together(OneRank())
        self._ledger, self._run.shared = Ledger(together), True
        self._samples = {
            role: Share(samples, 0, 1) for role, samples in self._samples.items() if isinstance(samples, Samples)
        }

    def _check_first(self, common: Mapping[str, Any]) -> None:
        """The rest of the data shows when it is read again, and at the latest in `Selection.subset`."""
        for role in _ROLES:
            if role not in common["firsts"]:
                continue
            batch = self._samples[role].first()
            if batch is None or digest_of(sample_digests(batch)).hex() != common["firsts"][role]:
                raise SelectionError(
                    f"its {role} {'were' if role == 'data' else 'set was'} another: the first batch differs"
                )
            if role == "data" and self._fixed is not None and common["losses"] is not None:
                losses = self._fixed.rows(batch).losses.cpu()
                if losses.shape != common["losses"].shape or not torch.allclose(losses, common["losses"], 1e-4, 1e-6):
                    raise SelectionError("its loss function was another: the losses of the first batch differ")
