"""The part of the data that one of several processes reads."""

from collections.abc import Iterator
from typing import Any

from steepest.errors import SelectionError
from steepest.selection.samples import Batch, Samples

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

    Example:
        >>> import torch
        >>> samples = Samples((torch.zeros(10, 3),), batch_size=2)
        >>> [[batch.indices.tolist() for batch in Share(samples, rank, 2).batches()] for rank in range(2)]
        [[[0, 1], [2, 3], [4, 5]], [[6, 7], [8, 9]]]
    """

    def __init__(self, samples: Samples, rank: int, size: int) -> None:
        self._samples, self._rank, self._size = samples, rank, size
        total = samples.num_batches
        # Once it has been gone through, a stream knows its length, but it is not shared out anew.
        self._span = None if total is None else (-(-total * rank // size), -(-total * (rank + 1) // size))
        self.every = _EVERY if total is None else max(1, -(-total // size) // _MEETINGS)
        self.length: int | None = None

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
        return None if self._span is None else self._span[1] - self._span[0]

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Go through the batches of this process.

        Args:
            start: How many of them to leave out at the beginning.

        Yields:
            The batches.
        """
        if self._span is not None:
            yield from self._samples.batches(self._span[0] + start, self._span[1])
            return
        for number, batch in enumerate(self._samples.batches()):
            if number % self._size == self._rank and number // self._size >= start:
                yield batch
        self.length = self._samples.num_samples

    def conclude(self, total: int) -> None:
        """Note how many samples all processes read together, or refuse another number than before.

        Args:
            total: Their number.

        Raises:
            SelectionError: If it is another one than before, or than this process found in a stream.
        """
        if self._span is None and self.length is not None and self.length != total:
            raise SelectionError(
                f"the processes read different streams: this one has {self.length} samples, and together they read "
                f"{total}. Give every process the same stream."
            )
        self._samples.conclude(total)
