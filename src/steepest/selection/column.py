"""One number for each sample, in one block of memory that grows."""

import torch
from torch import Tensor

__all__ = ["Column"]


class Column:
    """Numbers that come batch by batch and stay.

    A list of tensors, one per batch, would do but for the allocator: small tensors that stay keep it from using again
    what the batches between them took, and the memory of a process grows with the data.

    Args:
        dtype: Of the numbers.

    Example:
        >>> column = Column(torch.int64)
        >>> column.add(torch.tensor([3, 1]))
        >>> column.add(torch.tensor([4]))
        >>> column.tensor()
        tensor([3, 1, 4])
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._data = bytearray()

    def __len__(self) -> int:
        return len(self._data) // self._dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes that the numbers take."""
        return len(self._data)

    def add(self, values: Tensor) -> None:
        """Take the numbers of a batch, ``[B]``."""
        self._data += values.detach().to("cpu", self._dtype).numpy().tobytes()

    def tensor(self) -> Tensor:
        """Return a copy of all of them."""
        if not self._data:
            return torch.zeros(0, dtype=self._dtype, device="cpu")
        return torch.frombuffer(bytearray(self._data), dtype=self._dtype)
