"""The part of the data that one of several processes reads."""

from collections.abc import Iterator
from typing import Any

from steepest.errors import SelectionError
from steepest.selection.samples import Batch, Samples
from steepest.selection.spans import Spans, left, within

__all__ = ["Share"]

_MEETINGS = 64  # per pass, so that no process waits long for another; a meeting takes about a millisecond
_EVERY = 8  # batches of a stream between two meetings


class Share:
    """The batches of some samples that one process reads, as `Samples` has them all.

    They are the same batches as those of one process. Where their number is known, every process has a stretch of
    them, in the order of the ranks. Of a stream, which has to be read to know where a sample is, every process reads
    all and works on every W-th batch.

    Args:
        samples: All of them; the same on every process.
        rank: Number of this process.
        size: Number W of processes.

    Attributes:
        total: Number of batches of all processes; None for a stream.
        every: How many batches to work on between two meetings.
        length: Samples that were found in a stream.

    Example:
        >>> import torch
        >>> samples = Samples((torch.zeros(10, 3),), batch_size=2)
        >>> [[batch.indices.tolist() for batch in Share(samples, rank, 2).batches()] for rank in range(2)]
        [[[0, 1], [2, 3], [4, 5]], [[6, 7], [8, 9]]]
    """

    def __init__(self, samples: Samples, rank: int, size: int) -> None:
        self._samples, self._rank, self._size = samples, rank, size
        # Once it has been gone through, a stream knows its length, but it is not shared out anew.
        self.total = total = samples.num_batches
        self.every = _EVERY if total is None else max(1, -(-total // size) // _MEETINGS)
        self.length: int | None = None
        self.leave_out([])

    def leave_out(self, read: Spans) -> None:
        """Share out what other processes have left of a pass.

        Args:
            read: Numbers of the batches that they have read; none for the whole data.
        """
        self._read = read
        if self.total is None:
            return
        rest = left(self.total, read)
        number = sum(stop - start for start, stop in rest)
        self._mine = within(rest, -(-number * self._rank // self._size), -(-number * (self._rank + 1) // self._size))

    @property
    def dataset(self) -> Any:
        """What the indices point into."""
        return self._samples.dataset

    @property
    def num_samples(self) -> int | None:
        """Number of all samples; None where it is not known yet."""
        return self._samples.num_samples

    @property
    def batch_size(self) -> int | None:
        """Samples per batch."""
        return self._samples.batch_size

    @property
    def num_batches(self) -> int | None:
        """Batches of this process, None where their number is unknown."""
        return None if self.total is None else sum(stop - start for start, stop in self._mine)

    def first(self) -> Batch | None:
        """The first batch of all processes."""
        return self._samples.first()

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Go through the batches of this process.

        Args:
            start: How many of them to leave out at the beginning.

        Yields:
            The batches.
        """
        for _, batch in self.numbered(start):
            yield batch

    def numbered(self, start: int = 0) -> Iterator[tuple[int, Batch]]:
        """Go through the batches of this process.

        Args:
            start: How many of them to leave out at the beginning.

        Yields:
            The number of every batch among all, and the batch.
        """
        if self.total is not None:
            for low, high in within(self._mine, start, self.total):
                yield from enumerate(self._samples.batches(low, high), low)
            return
        turn, skipped = 0, iter([*self._read, [-1, -1]])
        low, high = next(skipped)
        for number, batch in enumerate(self._samples.batches()):
            if number == high:
                low, high = next(skipped)
            if low <= number < high:
                continue
            if turn % self._size == self._rank and turn // self._size >= start:
                yield number, batch
            turn += 1
        self.length = self._samples.num_samples

    def conclude(self, total: int) -> None:
        """Note how many samples all processes read together, or refuse another number than before.

        Args:
            total: Their number.

        Raises:
            SelectionError: If it is another one than before, or than this process found in a stream.
        """
        if self.total is None and self.length is not None and self.length != total:
            raise SelectionError(
                f"the processes read different streams: this one has {self.length} samples, and together they read "
                f"{total}. Give every process the same stream."
            )
        self._samples.conclude(total)
