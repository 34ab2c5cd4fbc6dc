"""What one forward and one backward leave behind for a group of parameters, in canonical layout.

A record covers every row of the Jacobian for the parameters it names. All reductions are linear algebra on it:
the product J^T w is the layer's weight gradient with weighted output gradients, never a second backward.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from steepest._typing import Sharing
from steepest.linalg.factors import product, second_moment
from steepest.linalg.outer import MeanOuter, add_outer, mirror_upper

__all__ = [
    "KroneckerFactors",
    "MaterializedRecord",
    "Record",
    "accumulate",
    "accumulate_cross",
    "as_rows",
    "at_least_float32",
    "column_chunks",
    "common_dtype",
    "factors_of",
    "join",
]

CHUNK_BYTES = 1 << 24


@dataclass(frozen=True, eq=False)
class KroneckerFactors:
    r"""Factors of :math:`F \approx A \otimes S` for one layer, in the precision of its record.

    Args:
        input_factor: A, ``[d_in (+ 1), d_in (+ 1)]``, the mean of ``x x^T`` with a 1 joined for the bias; of one-hot
            inputs its diagonal ``[d_in]``.
        grad_factor: S, ``[d_out, d_out]``, the mean over rows of ``g g^T``.
        positions: How many inputs A is the mean of.
    """

    input_factor: Tensor
    grad_factor: Tensor
    positions: int


def factors_of(parts: Iterable[tuple[Tensor, Tensor]], positions: int, rows: int) -> KroneckerFactors:
    """Factors of a layer from its inputs and output gradients, in full precision whatever autocast and TF32 say.

    Args:
        parts: Inputs ``[d_in (+ 1), columns]`` and output gradients ``[d_out, columns]``, some columns after others.
        positions: How many inputs A is the mean of.
        rows: How many rows S is the mean over.

    Returns:
        The means over everything.
    """
    inputs, grads = MeanOuter(positions), MeanOuter(rows)
    for x, g in parts:
        inputs.add(x)
        grads.add(g)
        del x, g  # the next ones are made in their memory
    return KroneckerFactors(inputs.value(), grads.value(), positions)


class Record(ABC):
    """The rows of the Jacobian for one group of parameters.

    Attributes:
        names: Qualified names of the parameters, each in exactly one record of a Jacobian.
        shapes: Their shapes; after `restrict`, the shapes of the kept output rows.
        num_rows: Number of rows R.
    """

    names: tuple[str, ...]
    shapes: dict[str, torch.Size]
    num_rows: int
    _like: Tensor  # of the gradients' dtype and device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the gradients."""
        return self._like.dtype

    @abstractmethod
    def per_sample_grads(self) -> dict[str, Tensor]:
        """Gradient of each row, ``[R, *shape]`` for each name."""

    @abstractmethod
    def gram(self, dtype: torch.dtype, max_memory: int) -> Tensor:
        """``J J^T`` of this group, ``[R, R]``, formed and accumulated in ``dtype``."""

    @abstractmethod
    def vjp(self, weights: Tensor) -> dict[str, Tensor]:
        """``J^T w`` for ``w`` of shape ``[R]``."""

    def add_vjp_(self, targets: Mapping[str, Tensor], weights: Tensor, alphas: Mapping[str, float]) -> None:
        """Add ``alpha J^T w`` to tensors in place."""
        for name, grad in self.vjp(weights).items():
            targets[name].add_(grad, alpha=alphas[name])

    @abstractmethod
    def jvp(self, vector: Mapping[str, Tensor]) -> Tensor:
        """``J v``, ``[R]``."""

    @abstractmethod
    def restrict(self, index: Mapping[str, Tensor]) -> "Record":
        """Keep output rows (dimension 0), given by name; the same for names that are coupled."""

    @abstractmethod
    def parts(self) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
        """What `of_parts` makes the same record of: names and sizes that can be pickled, and tensors."""

    @classmethod
    @abstractmethod
    def of_parts(cls, options: tuple[Any, ...], tensors: Sequence[Tensor]) -> "Record":
        """Make a record of its `parts`, perhaps in another process."""

    def cross_gram(self, other: "Record", dtype: torch.dtype, max_memory: int) -> Tensor:
        """``J K^T`` with other rows K of the same parameters, ``[R, R']``: here by explicit gradients of some rows."""
        gram = self._like.new_zeros(self.num_rows, other.num_rows, dtype=dtype)
        common = [name for name in self.names if name in other.names]
        for rows, grads in self._in_pieces(max_memory // 2):
            for columns, others in other._in_pieces(max_memory // 2):
                for name in common:
                    accumulate_cross(gram[rows, columns], as_rows(grads[name]), as_rows(others[name]), max_memory)
        return gram

    def row_bytes(self) -> int:
        """Memory that the explicit gradient of one row takes while it is made."""
        return sum(shape.numel() for shape in self.shapes.values()) * self._like.itemsize

    def project(self, vectors: Mapping[str, Tensor], max_memory: int) -> Tensor:
        """``J V^T``, ``[R, L]``, for vectors ``[L, *shape]`` by name."""
        out = self._like.new_zeros(self.num_rows, len(vectors[self.names[0]]))
        for rows, grads in self._in_pieces(max_memory):
            for name, grad in grads.items():
                out[rows].addmm_(as_rows(grad), as_rows(vectors[name]).to(grad.dtype).T)
        return out

    def squared_norms(self, max_memory: int) -> Tensor:
        """Squared norm of every row, ``[R]`` in float64."""
        out = self._like.new_zeros(self.num_rows, dtype=torch.float64)
        for rows, grads in self._in_pieces(max_memory):
            for grad in grads.values():
                out[rows] += torch.linalg.vector_norm(as_rows(grad), dim=1, dtype=torch.float64).square()
        return out

    def _in_pieces(self, max_memory: int) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """Yield explicit gradients of some rows after others."""
        for rows in column_chunks(self.num_rows, self.row_bytes(), max_memory):
            yield rows, self.take(rows).per_sample_grads()

    def take(self, rows: slice) -> "Record":
        """Keep some rows."""
        return self.materialize().take(rows)

    def summed(self) -> tuple[Tensor, ...]:
        """Gradient of the sum of all rows, for each name in order."""
        grads = self.vjp(self._like.new_ones(self.num_rows))
        return tuple(grads[name] for name in self.names)

    def coupled(self) -> tuple[tuple[str, ...], ...]:
        """Names that share their output rows, and so the index of `restrict`."""
        return (self.names,)

    @abstractmethod
    def concat_rows(self, others: Sequence[Self]) -> "Record | None":
        """Stack this record over others of its type; None where their sizes do not allow it."""

    @abstractmethod
    def concat_shared(self, other: Self) -> "Record | None":
        """Add a second use of the same parameters by the same rows; None where it cannot be."""

    def rowwise(self) -> "Record":
        """Return the same rows in the form that records of one row to a sample have."""
        return self

    def materialize(self) -> "MaterializedRecord":
        """Return the same rows as explicit per-sample gradients."""
        return MaterializedRecord(self.per_sample_grads())

    def kronecker_factors(self, sharing: Sharing) -> KroneckerFactors | None:
        """Factors of the group's Fisher block; None for parameters without a Kronecker rule."""
        return None

    def positions(self, sharing: Sharing) -> tuple[Tensor, Tensor]:
        """Inputs ``[R, S, d_in (+ 1)]`` and output gradients ``[R, S, d_out]`` of a layer with Kronecker factors."""
        raise NotImplementedError(f"{type(self).__name__} has no Kronecker factors")

    def whitened(self, input_root: Tensor, grad_root: Tensor) -> "Record":
        """Change the coordinates of a layer's weight, its bias joined as a last column.

        Args:
            input_root: A, ``[d_in (+ 1), d_in (+ 1)]``.
            grad_root: S, ``[d_out, d_out]``.

        Returns:
            Rows ``S^T G A`` in place of the gradients G ``[d_out, d_in (+ 1)]``, by the name of the weight alone, which
            is the first of `names`.
        """
        weight, *bias = self.names
        grads = self.per_sample_grads()
        matrix = grads[weight].flatten(2)
        if bias:
            matrix = torch.cat([matrix, grads[bias[0]].unsqueeze(2)], 2)
        return MaterializedRecord({weight: product(grad_root.to(matrix).mT, matrix, input_root.to(matrix))})

    def scaled(self, factor: float) -> "Record":
        """The rows times a number."""
        options, tensors = self.parts()
        return self.of_parts(options, (*tensors[:-1], tensors[-1] * factor))  # the last one is the output gradients

    def second_moment(self, grad_basis: Tensor, input_basis: Tensor) -> Tensor:
        """Mean square of the rows in the eigenbasis of A and S, ``[d_out, d_in (+ 1)]``."""
        return second_moment(grad_basis, input_basis, *self.positions("expand"))

    def zero_rows(self, rows: int) -> "MaterializedRecord":
        """Return rows that do not depend on these parameters."""
        return MaterializedRecord({n: self._like.new_zeros(rows, *shape) for n, shape in self.shapes.items()})


class MaterializedRecord(Record):
    """Explicit per-sample gradients: for small parameters, and for uses without a rule of their own.

    Args:
        grads: ``[R, *shape]`` for each parameter name.
    """

    def __init__(self, grads: dict[str, Tensor]) -> None:
        self._grads = grads
        self.names = tuple(grads)
        self.shapes = {name: grad.shape[1:] for name, grad in grads.items()}
        self._like = next(iter(grads.values()))
        self.num_rows = self._like.shape[0]

    def per_sample_grads(self) -> dict[str, Tensor]:
        """Gradient of each row."""
        return dict(self._grads)

    def gram(self, dtype: torch.dtype, max_memory: int) -> Tensor:
        """``J J^T``, a few columns at a time."""
        gram = next(iter(self._grads.values())).new_zeros(self.num_rows, self.num_rows, dtype=dtype)
        for grad in self._grads.values():
            accumulate(gram, grad.reshape(self.num_rows, -1), max_memory)
        return gram

    def parts(self) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
        """Names, and a tensor for each."""
        return self.names, tuple(self._grads.values())

    @classmethod
    def of_parts(cls, options: tuple[Any, ...], tensors: Sequence[Tensor]) -> "MaterializedRecord":
        """Join them again."""
        return MaterializedRecord(dict(zip(options, tensors, strict=True)))

    def scaled(self, factor: float) -> "MaterializedRecord":
        """The rows times a number."""
        return MaterializedRecord({name: grad * factor for name, grad in self._grads.items()})

    def vjp(self, weights: Tensor) -> dict[str, Tensor]:
        """``J^T w`` as one product per parameter."""
        return {
            name: (weights.to(grad.dtype) @ grad.reshape(self.num_rows, -1)).view(self.shapes[name])
            for name, grad in self._grads.items()
        }

    def jvp(self, vector: Mapping[str, Tensor]) -> Tensor:
        """``J v``."""
        parts = [g.reshape(self.num_rows, -1) @ vector[n].reshape(-1).to(g.dtype) for n, g in self._grads.items()]
        return torch.stack(parts).sum(0)

    def restrict(self, index: Mapping[str, Tensor]) -> "MaterializedRecord":
        """Keep some output rows; a scalar parameter is kept whole."""
        return MaterializedRecord({
            n: g.index_select(1, index[n]) if g.ndim > 1 and n in index else g for n, g in self._grads.items()
        })

    def take(self, rows: slice) -> "MaterializedRecord":
        """Keep some rows."""
        return MaterializedRecord({name: grad[rows] for name, grad in self._grads.items()})

    def coupled(self) -> tuple[tuple[str, ...], ...]:
        """Every name for itself."""
        return tuple((name,) for name in self.names)

    def concat_rows(self, others: Sequence[Self]) -> "MaterializedRecord":
        """Stack rows; where a part lacks a parameter its rows are zero."""
        parts = [self, *others]
        shapes = {n: g for part in parts for n, g in part._grads.items()}

        def rows(part: MaterializedRecord, name: str) -> Tensor:
            like = shapes[name]
            return part._grads[name] if name in part._grads else like.new_zeros(part.num_rows, *like.shape[1:])

        return MaterializedRecord({n: torch.cat([rows(part, n) for part in parts]) for n in shapes})

    def concat_shared(self, other: Self) -> "MaterializedRecord":
        """Add the gradients of two uses; a parameter that one of them lacks counts as unused there."""
        merged = dict(self._grads)
        for name, grad in other._grads.items():
            merged[name] = merged[name] + grad if name in merged else grad
        return MaterializedRecord(merged)


def join(records: Sequence[Record], *, rows: bool) -> Record:
    """Join records of one group of parameters: of several uses by the same rows, or of different rows.

    Args:
        records: At least one record.
        rows: Whether to stack rows (else to add up uses).

    Returns:
        One record; with explicit gradients where the parts have no common form.
    """
    if len(records) == 1:
        return records[0]
    first, *others = records
    if all(type(other) is type(first) for other in others):
        joined = first.concat_rows(others) if rows else first.concat_shared(others[0])
        if joined is not None:
            return joined if rows or len(others) == 1 else join([joined, *others[1:]], rows=False)
    if rows:
        single = [record.rowwise() for record in records]
        if any(after is not before for after, before in zip(single, records, strict=True)):
            return join(single, rows=True)
    made = [record.materialize() for record in records]
    return join(made, rows=rows)


def as_rows(stack: Tensor) -> Tensor:
    """Flatten all but the first dimension, of scalars too."""
    return stack.reshape(len(stack), stack.shape[1:].numel())


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return half-precision tensors as float32, others as they are."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def common_dtype(inputs: Tensor, output_grads: Tensor) -> tuple[Tensor, Tensor]:
    """Bring both halves of a record to one dtype, at least float32: autocast mixes them."""
    if inputs.dtype == output_grads.dtype and inputs.dtype.itemsize >= 4:
        return inputs, output_grads
    dtype = torch.promote_types(torch.promote_types(inputs.dtype, output_grads.dtype), torch.float32)
    return inputs.to(dtype), output_grads.to(dtype)


def column_chunks(total: int, bytes_per_column: int, max_memory: int) -> Iterator[slice]:
    """Cut ``range(total)`` so that one chunk's temporary stays within ``max_memory`` bytes (at least one column).

    Args:
        total: Number of columns.
        bytes_per_column: Size of one column of the temporary.
        max_memory: Bytes allowed.

    Yields:
        Slices that cover the range in order.
    """
    width = max(1, max_memory // max(1, bytes_per_column))
    for start in range(0, total, width):
        yield slice(start, min(start + width, total))


def accumulate(gram: Tensor, matrix: Tensor, max_memory: int) -> None:
    """Add ``matrix @ matrix.T`` to ``gram`` in place, in the Gram's precision, a few columns at a time.

    Args:
        gram: ``[R, R]``.
        matrix: ``[R, columns]``.
        max_memory: Bytes allowed for a chunk in the Gram's precision.
    """
    # Chunks beyond the cache gain nothing, and large allocations cost page faults each time anew.
    limit = min(max_memory, CHUNK_BYTES)
    for columns in column_chunks(matrix.shape[1], matrix.shape[0] * gram.itemsize, limit):
        add_outer(gram, matrix[:, columns].to(gram.dtype))
    mirror_upper(gram)


def accumulate_cross(gram: Tensor, left: Tensor, right: Tensor, max_memory: int) -> None:
    """Add ``left @ right.T`` to ``gram`` in place, in the Gram's precision, a few columns at a time.

    Args:
        gram: ``[R, R']``.
        left: ``[R, columns]``.
        right: ``[R', columns]``.
        max_memory: Bytes allowed for a chunk of both in the Gram's precision.
    """
    limit = min(max_memory, CHUNK_BYTES)
    for columns in column_chunks(left.shape[1], (len(left) + len(right)) * gram.itemsize, limit):
        gram.addmm_(left[:, columns].to(gram.dtype), right[:, columns].to(gram.dtype).T)
