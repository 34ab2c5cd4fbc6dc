"""A table with a row for every sample, kept within a limit of memory."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from steepest.errors import InvalidOptionError, NonFiniteError

__all__ = ["Table"]

BLOCK_NUMBERS = 1 << 22  # 16 MiB: growth moves nothing, and no more than this lies idle


class Table:
    """Float32 rows of one width that grow in blocks, up to a limit.

    Args:
        method: Name of the class of the method, for messages.
        max_memory: Bytes that the rows may take.

    Attributes:
        num_rows: How many rows it holds.
        expected: How many it will hold in the end, where that is known.
    """

    def __init__(self, method: str, max_memory: int) -> None:
        self.num_rows = 0
        self.expected: int | None = None
        self._method, self._max_memory = method, max_memory
        self._blocks: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        """Bytes that it holds, or will hold in the end where that is known."""
        held = sum(block.nbytes for block in self._blocks)
        return max(held, 4 * self.width * self.expected) if self.expected else held

    @property
    def width(self) -> int:
        """Numbers in a row; 0 as long as there is none."""
        return self._blocks[0].shape[1] if self._blocks else 0

    def append(self, rows: Tensor, first: int | None = None) -> None:
        """Add rows ``[B, W]`` of any float dtype.

        Args:
            rows: The rows, on any device.
            first: Position in the data of the first of them, for messages, where it is not their number.

        Raises:
            InvalidOptionError: If the table grows beyond its limit, or is known to.
            NonFiniteError: If a row holds NaN or infinity; nothing is added.
        """
        rows = rows.detach().to("cpu", torch.float32)
        self._check_memory(len(rows), rows.shape[1])
        if not bool(rows.isfinite().all()):
            sample = (self.num_rows if first is None else first) + int((~rows.isfinite()).any(1).int().argmax())
            raise NonFiniteError(
                f"The features of sample {sample} hold NaN or infinity (in float32), and no distance to them exists: "
                "look at that sample, or at the model's weights."
            )
        while len(rows):
            at = self.num_rows % self._block_rows(rows.shape[1])
            if at == 0:
                self._blocks.append(rows.new_empty(self._block_rows(rows.shape[1]), rows.shape[1]))
            fitting = rows[: len(self._blocks[-1]) - at]
            self._blocks[-1][at : at + len(fitting)] = fitting
            self.num_rows += len(fitting)
            rows = rows[len(fitting) :]

    def gather(self, positions: Tensor) -> Tensor:
        """Return a copy of some rows.

        Args:
            positions: ``[n]``, ascending.

        Returns:
            ``[n, W]``.
        """
        out = torch.empty(len(positions), self.width, dtype=torch.float32, device="cpu")
        size = self._block_rows(self.width)
        edges = torch.searchsorted(positions, torch.arange(len(self._blocks) + 1, device="cpu") * size).tolist()
        for number, block in enumerate(self._blocks):
            span = slice(edges[number], edges[number + 1])
            torch.index_select(block, 0, positions[span] - number * size, out=out[span])
        return out

    def own(self, width: int, total: int) -> Tensor:
        """Return all rows, to be joined with those of other processes.

        Args:
            width: Numbers in a row, of a table without rows too.
            total: How many rows there will be then.

        Returns:
            ``[n, W]``.
        """
        self._check_memory(total - self.num_rows, width)
        return self.gather(torch.arange(self.num_rows, device="cpu")) if self.num_rows else torch.zeros(0, width)

    def replace(self, rows: Tensor) -> None:
        """Take other rows, of as many numbers, in place of those that it has.

        Args:
            rows: ``[n, W]`` in float32 on the CPU; not copied.
        """
        self._blocks, self.num_rows = list(rows.split(self._block_rows(rows.shape[1]))), len(rows)

    def state_dict(self) -> dict[str, Any]:
        """The rows; blocks are shared, for what comes later is written behind these rows."""
        last = self.num_rows - sum(map(len, self._blocks[:-1]))
        return {"blocks": [*self._blocks[:-1], *(block[:last] for block in self._blocks[-1:])]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a state of a table with the same limit."""
        *whole, last = state["blocks"] or [None]
        self._blocks, self.num_rows = list(whole), sum(map(len, state["blocks"]))
        if last is not None:
            self._blocks.append(last.new_empty(self._block_rows(last.shape[1]), last.shape[1]))
            self._blocks[-1][: len(last)] = last

    def _block_rows(self, width: int) -> int:
        return max(1, min(BLOCK_NUMBERS, self._max_memory // 4) // max(1, width))

    def _check_memory(self, more: int, width: int) -> None:
        known = self.expected is not None
        total = max(self.num_rows + more, self.expected or 0)
        needed = 4 * total * width
        if needed > self._max_memory:
            raise InvalidOptionError(
                f"{self._method} keeps {width} float32 numbers per sample: {_size(needed)} for "
                f"{total if known else f'the first {total}'} samples, and max_memory allows {_size(self._max_memory)}. "
                "Choose a method that keeps a few numbers per sample (SAGE, EL2N, Random), select from fewer samples, "
                f"or give {self._method}(max_memory=...) {needed} bytes{'' if known else ' or more'}."
            )


def _size(number: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} bytes"
