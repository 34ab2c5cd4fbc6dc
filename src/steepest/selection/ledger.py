"""What one of several processes read in a pass: which samples, and their digests, to be joined with the others'."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from steepest.errors import InvalidOptionError
from steepest.selection.column import Column
from steepest.selection.content import DIGEST, chain
from steepest.selection.together import Together

__all__ = ["Ledger"]


class Ledger:
    """Positions and digests of the samples that this process read, for the fingerprint that one process would make.

    Every sample is digested where it is read; the digests of all are chained in the data's own order, by every process.

    Args:
        together: The processes.

    Attributes:
        labelled: Whether the data have labels.
        begun: How many samples one process had read by itself before these went on, and their fingerprint.
    """

    def __init__(self, together: Together) -> None:
        self.together = together
        self.labelled = False
        self.clear()

    @property
    def positions(self) -> Tensor:
        """Samples that this process read in the pass, ``[n]``."""
        return self._positions.tensor()

    def clear(self) -> None:
        """Begin a pass."""
        self.begun = (0, b"")
        self._positions = Column(torch.int64)
        self._digests = Column(torch.uint8)

    def add(self, positions: Tensor, digests: bytes) -> None:
        """Note a batch.

        Args:
            positions: Of its samples.
            digests: Of its samples; empty once the fingerprint is known.
        """
        self._positions.add(positions)
        if digests:
            self._digests.add(torch.frombuffer(bytearray(digests), dtype=torch.uint8))

    def meet(self, seen: int, labels: int, *, check_labels: bool) -> int:
        """Tell each other what was read, at the end of a pass.

        Args:
            seen: Samples that this process read.
            labels: Labels that it found.
            check_labels: Whether this pass looked for labels.

        Returns:
            Samples that all read together.

        Raises:
            InvalidOptionError: If some processes found labels and others did not.
        """
        told = self.together.told((seen, labels))
        if check_labels:
            found = {found == read for read, found in told if read}
            self.labelled = found == {True}
            if len(found) > 1:
                raise InvalidOptionError(
                    "some processes found whole-number labels in their part of the data and others none: give labels= "
                    "for all samples, or make the batches alike."
                )
        self.together.meet(self._positions.tensor())
        return sum(read for read, _ in told)

    def fingerprint(self) -> bytes:
        """Make the fingerprint of all data, after `meet`."""
        digests = self.together.in_order(self._digests.tensor().view(-1, DIGEST))
        number, before = self.begun
        return chain(before, digests[number:].numpy().tobytes())

    def state(self) -> dict[str, Any]:
        """What was noted."""
        return {"positions": self._positions.tensor(), "digests": self._digests.tensor()}

    def take_over(self, shares: Iterable[Mapping[str, Any]], *, digests: bool) -> None:
        """Go on from what some processes had noted.

        Args:
            shares: Of each what `state` returned, or of one that read by itself how many samples it had ``seen``.
            digests: Whether the fingerprint is still to be made.
        """
        for share in shares:
            if share["positions"] is None:
                self.add(torch.arange(share["seen"], device="cpu"), bytes(share["seen"] * DIGEST) if digests else b"")
            else:
                self._positions.add(share["positions"])
                self._digests.add(share["digests"])
