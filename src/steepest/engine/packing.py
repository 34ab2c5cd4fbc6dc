"""Records as tensors and a few words about them, so that another process can make the same records again."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from steepest.engine.records import MaterializedRecord, Record

__all__ = ["RecordForm"]


@dataclass(frozen=True)
class RecordForm:
    """All of a record but its numbers; it can be pickled, and is small.

    Args:
        kind: Class of the record.
        options: What its tensors do not tell.
        tensors: Shape and dtype of every tensor.
        shapes: Names and shapes of the parameters.
        num_rows: Number of rows.
        dtype: dtype of the gradients.

    Example:
        >>> import torch, pickle
        >>> from steepest.engine.linear import LinearRecord
        >>> record = LinearRecord("weight", "bias", torch.ones(2, 1, 3), torch.ones(2, 1, 4))
        >>> form = pickle.loads(pickle.dumps(RecordForm.of(record)))
        >>> form.nbytes, form.explicit().nbytes
        (56, 128)
        >>> form.build(record.parts()[1]).per_sample_grads()["weight"].shape
        torch.Size([2, 4, 3])
    """

    kind: type[Record]
    options: tuple[Any, ...]
    tensors: tuple[tuple[torch.Size, torch.dtype], ...]
    shapes: tuple[tuple[str, torch.Size], ...]
    num_rows: int
    dtype: torch.dtype

    @classmethod
    def of(cls, record: Record) -> Self:
        """Describe a record."""
        options, tensors = record.parts()
        sizes = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        return cls(type(record), options, sizes, tuple(record.shapes.items()), record.num_rows, record.dtype)

    @property
    def nbytes(self) -> int:
        """Size of the tensors."""
        return sum(shape.numel() * dtype.itemsize for shape, dtype in self.tensors)

    def explicit(self) -> "RecordForm":
        """Describe the same rows as explicit gradients."""
        if self.kind is MaterializedRecord:
            return self
        names = tuple(name for name, _ in self.shapes)
        sizes = tuple((torch.Size([self.num_rows, *shape]), self.dtype) for _, shape in self.shapes)
        return RecordForm(MaterializedRecord, names, sizes, self.shapes, self.num_rows, self.dtype)

    def empty(self, device: torch.device) -> list[Tensor]:
        """Make room for the tensors."""
        return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self.tensors]

    def build(self, tensors: Sequence[Tensor]) -> Record:
        """Make the record of its tensors."""
        return self.kind.of_parts(self.options, tensors)
