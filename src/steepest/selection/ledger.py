"""What one of several processes read in a pass: which samples, and their digests, to be joined with the others'."""

from collections.abc import Mapping
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
        fingerprint: Of all data; known after the first pass over them.
        labelled: Whether the data have labels.
    """

    def __init__(self, together: Together) -> None:
        self.together = together
        self.fingerprint = b""
        self.labelled = False
        self.clear()

    def clear(self) -> None:
        """Begin a pass."""
        self._positions = Column(torch.int64)
        self._digests = Column(torch.uint8)

    def add(self, positions: Tensor, digests: bytes) -> None:
        """Note a batch.

        Args:
            positions: Of its samples.
            digests: Of its samples; kept until the data have been gone through once.
        """
        self._positions.add(positions)
        if not self.fingerprint:
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

    def join_digests(self) -> None:
        """Make the fingerprint of all data."""
        digests = self.together.in_order(self._digests.tensor().view(-1, DIGEST))
        self.fingerprint = chain(b"", digests.numpy().tobytes())

    def state_dict(self) -> dict[str, Any]:
        """Return what was noted."""
        return {
            "fingerprint": self.fingerprint.hex(),
            "labelled": self.labelled,
            "positions": self._positions.tensor(),
            "digests": self._digests.tensor(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a state."""
        self.clear()
        self.fingerprint, self.labelled = bytes.fromhex(state["fingerprint"]), state["labelled"]
        self._positions.add(state["positions"])
        self._digests.add(state["digests"])
