"""Whether every pass sees the same data: a digest of every batch, as it was when it was read first."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steepest.selection.column import Column
from steepest.selection.content import DIGEST
from steepest.selection.together import Together

__all__ = ["Unchanged", "digest_of"]


def digest_of(digests: bytes) -> bytes:
    """Digest of a batch.

    Args:
        digests: Of its samples.

    Returns:
        32 bytes.
    """
    return hashlib.sha256(digests).digest()


class Unchanged:
    """Digests of batches by their numbers; 40 bytes for each batch that this process knows of.

    Example:
        >>> seen = Unchanged()
        >>> seen.agrees(0, digest_of(b"as it was"))
        True
        >>> seen.seal()
        >>> seen.agrees(0, digest_of(b"another")), seen.agrees(1, digest_of(b"not read before"))
        (False, True)
    """

    def __init__(self) -> None:
        self._rows = np.zeros((0, 8 + DIGEST), np.uint8)  # of passes that are done, in the order of the numbers
        self._numbers = np.zeros(0, np.int64)
        self._more = Column(torch.uint8)  # of the pass under way

    def agrees(self, number: int, digest: bytes) -> bool:
        """Compare a batch with what it was; one that is not known is noted.

        Args:
            number: Its number.
            digest: Its digest.

        Returns:
            Whether it is the same, as far as is known.
        """
        place = int(np.searchsorted(self._numbers, number))
        if place < len(self._numbers) and self._numbers[place] == number:
            return bool(self._rows[place, 8:].tobytes() == digest)
        self._more.add(torch.frombuffer(bytearray(np.int64(number).tobytes() + digest), dtype=torch.uint8))
        return True

    def seal(self) -> None:
        """Let the next pass be compared with what was noted."""
        self._take([self.state()])

    def join(self, together: Together) -> None:
        """Tell all processes what each of them noted.

        Args:
            together: The processes.
        """
        self._take(together.gather(self.state()))

    def state(self) -> Tensor:
        """All that is known, ``[n, 40]``: numbers and digests."""
        return torch.cat([torch.from_numpy(self._rows.copy()).flatten(), self._more.tensor()]).view(-1, 8 + DIGEST)

    @classmethod
    def of(cls, states: Iterable[Mapping[str, Any]], role: str) -> "Unchanged":
        """Put together what several processes knew.

        Args:
            states: By role, what `state` returned.
            role: The role.

        Returns:
            All of it.
        """
        made = cls()
        made._take([state[role] for state in states if role in state] or [made.state()])
        return made

    def _take(self, states: Iterable[Tensor]) -> None:
        rows = torch.cat(list(states)).numpy()
        numbers = np.ascontiguousarray(rows[:, :8]).view(np.int64)[:, 0]
        self._numbers, places = np.unique(numbers, return_index=True)
        self._rows = rows[places]
        self._more = Column(torch.uint8)
