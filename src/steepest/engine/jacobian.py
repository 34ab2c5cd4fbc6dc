"""The Jacobian of one batch: never formed, only multiplied, unless its rows are asked for."""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from steepest._typing import Precision, Sharing
from steepest._validation import check_choice
from steepest.engine.columns import check_columns, check_vector, layer_positions, shaped_vectors
from steepest.engine.records import KroneckerFactors, Record, as_rows
from steepest.errors import InvalidOptionError
from steepest.linalg.outer import outer

__all__ = ["Jacobian", "RowSketch", "caller_independent"]


P = ParamSpec("P")
T = TypeVar("T")


class RowSketch(Protocol):
    """A streaming summary of rows that arrive in blocks of columns."""

    def insert(self, blocks: Mapping[str, Tensor], /) -> None:
        """Take rows, ``[R, numel]`` for each parameter."""


def caller_independent(method: Callable[P, T]) -> Callable[P, T]:
    """Run a method the same way under the caller's no_grad and autocast, which would round its products."""

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        autocast = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
        with torch.enable_grad():
            if not autocast:
                return method(*args, **kwargs)
            with contextlib.ExitStack() as stack:
                for device in autocast:
                    stack.enter_context(torch.autocast(device, enabled=False))
                return method(*args, **kwargs)

    return run


class Jacobian:
    r"""Jacobian :math:`J \in R^{R \times P}` of R rows (losses or residuals) in the parameters, for one batch.

    It is immutable and holds what one forward and one backward left behind: layer inputs and output gradients.
    Rows are gradients of the rows themselves, never divided by R. Made by `Capture.jacobian` and
    `ReferenceCapture.jacobian`.

    Args:
        records: Records of disjoint groups of parameters, all with ``num_rows`` rows.
        shapes: Shape of every parameter by qualified name, used or not.
        num_rows: Number of rows R.
        max_memory: Bytes that the temporaries of `gram` may take.
        device: Device of the rows.
        dtype: dtype of the rows.

    Example:
        >>> import torch, steepest as st
        >>> model = torch.nn.Linear(2, 1)
        >>> capture = st.Capture(model)
        >>> with capture:
        ...     residuals = model(torch.tensor([[1.0, 0.0], [0.0, 2.0]])).squeeze(1)
        >>> jacobian = capture.jacobian(residuals)
        >>> jacobian.gram()  # weight part plus 1 for the bias
        tensor([[2., 1.],
                [1., 5.]], dtype=torch.float64)
        >>> jacobian.vjp(torch.tensor([1.0, 1.0]))["weight"]
        tensor([[1., 2.]])
    """

    def __init__(
        self,
        records: Sequence[Record],
        shapes: Mapping[str, torch.Size],
        num_rows: int,
        max_memory: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._records = tuple(records)
        self._shapes = dict(shapes)
        self._num_rows = num_rows
        self._max_memory = max_memory
        self._device, self._dtype = device, dtype

    def __repr__(self) -> str:
        return f"Jacobian(rows={self.num_rows}, parameters={self.num_parameters}, device={self._device})"

    @property
    def num_rows(self) -> int:
        """Number of rows R."""
        return self._num_rows

    @property
    def num_parameters(self) -> int:
        """Number of columns P."""
        return sum(shape.numel() for shape in self._shapes.values())

    @property
    def names(self) -> tuple[str, ...]:
        """Qualified names of the parameters, in the model's order."""
        return tuple(self._shapes)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shape of each parameter (after `restrict`, of its kept output rows)."""
        return dict(self._shapes)

    @property
    def records(self) -> tuple[Record, ...]:
        """The records of disjoint groups of parameters."""
        return self._records

    @property
    def max_memory(self) -> int:
        """Bytes that the temporaries of `gram` may take."""
        return self._max_memory

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the rows."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Device of the rows."""
        return self._device

    @caller_independent
    def per_sample_grads(self) -> dict[str, Tensor]:
        """Return the gradient of every row.

        Returns:
            ``[R, *shape]`` for each parameter, zeros for a parameter that the rows do not use.
        """
        return self._complete([record.per_sample_grads() for record in self._records], (self._num_rows,))

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the matrix itself.

        Args:
            dtype: dtype of the result; the parameters' own by default.

        Returns:
            ``[R, P]``, parameters flattened and concatenated in the order of `names`.
        """
        grads = self.per_sample_grads()
        return torch.cat([g.reshape(self._num_rows, -1).to(dtype or g.dtype) for g in grads.values()], 1)

    @caller_independent
    def gram(self, precision: Precision = "float64") -> Tensor:
        """Return ``J J^T``, summed over layers in the cheaper of two exact forms.

        Singular values of J below ``sqrt(eps) * sigma_max`` drown in the rounding of the Gram: about 1.5e-8 for
        float64 products, 3.4e-4 for float32 ones. Activations in float32 add a floor of their own near 3e-6.

        Args:
            precision: Precision of products and accumulation; "float32" is cheaper.

        Returns:
            ``[R, R]`` in that precision.

        Raises:
            InvalidOptionError: If ``precision`` is something else.
        """
        check_choice("precision", precision, ("float64", "float32"))
        dtype = torch.float64 if precision == "float64" else torch.float32
        parts = (record.gram(dtype, self._max_memory) for record in self._records)
        gram = next(parts)
        for part in parts:
            gram += part
        return gram

    @caller_independent
    def cross_gram(self, other: "Jacobian", precision: Precision = "float64") -> Tensor:
        """Return ``J K^T`` with the Jacobian K of other rows, layer by layer in the cheaper of two exact forms.

        Args:
            other: K, of the same parameters.
            precision: Precision of products and accumulation, as in `gram`.

        Returns:
            ``[R, rows of K]`` in that precision.

        Raises:
            InvalidOptionError: If ``precision`` is something else, or K has other parameters.
        """
        check_choice("precision", precision, ("float64", "float32"))
        check_columns(self._shapes, other.shapes)
        dtype = torch.float64 if precision == "float64" else torch.float32
        gram = torch.zeros(self._num_rows, other.num_rows, dtype=dtype, device=self._device)
        for record in self._records:
            for theirs in other.records:
                if not set(record.names).isdisjoint(theirs.names):
                    gram += record.cross_gram(theirs, dtype, self._max_memory)
        return gram

    @caller_independent
    def normal_equations(self, rhs: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return ``J^T J`` and ``J^T r``, which are small where there are more rows than parameters.

        Args:
            rhs: r, ``[R]``.
            dtype: dtype of the products.

        Returns:
            ``[P, P]`` and ``[P]``, parameters in the order of `to_dense`.
        """
        dense = self.to_dense(dtype)
        return outer(dense.T), dense.T @ rhs.to(dtype)

    @caller_independent
    def vjp(self, weights: Tensor) -> dict[str, Tensor]:
        """Return ``J^T w``: one matrix product per layer, no second backward.

        Args:
            weights: ``[R]``; an indicator gives the gradient of a sub-batch.

        Returns:
            One tensor of the parameter's shape for each parameter, zeros where it is unused.

        Raises:
            InvalidOptionError: If ``weights`` has another shape.
        """
        self._check_weights(weights)
        return self._complete([record.vjp(weights) for record in self._records], ())

    @caller_independent
    def add_vjp_(self, targets: Mapping[str, Tensor], weights: Tensor, alphas: Mapping[str, float]) -> None:
        """Add ``alpha J^T w`` to tensors in place, most of it with no temporary of their size.

        Args:
            targets: The tensor to change for each parameter that the rows use, such as the parameter itself.
            weights: ``[R]``.
            alphas: A factor for each parameter.

        Raises:
            InvalidOptionError: If ``weights`` has another shape.
        """
        self._check_weights(weights)
        weights = weights.to(self._dtype)
        with torch.no_grad():
            for record in self._records:
                record.add_vjp_(targets, weights, alphas)

    def _check_weights(self, weights: Tensor) -> None:
        if weights.shape != (self._num_rows,):
            raise InvalidOptionError(
                f"vjp weights have shape {tuple(weights.shape)}: give one number for each of the {self._num_rows} rows."
            )

    @caller_independent
    def jvp(self, vector: Mapping[str, Tensor]) -> Tensor:
        """Return ``J v`` for ``v`` in parameter space.

        Args:
            vector: A tensor of the parameter's shape for every name in `names`.

        Returns:
            ``[R]``.

        Raises:
            InvalidOptionError: If a parameter is missing or has another shape.
        """
        check_vector(self._shapes, vector)
        out = torch.zeros(self._num_rows, dtype=self._dtype, device=self._device)
        for record in self._records:
            out = out + record.jvp(vector)
        return out

    @caller_independent
    def kronecker_factors(self, sharing: Sharing = "expand") -> dict[tuple[str, ...], KroneckerFactors]:
        r"""Return the Kronecker factors of the rows' Fisher, layer by layer.

        .. math:: F = \tfrac1R \sum_n \nabla r_n \nabla r_n^T \approx A \otimes S

        exact for one row, one position. Rows are losses of one sample each, so no 1/R is to be undone.

        Args:
            sharing: For weights shared over positions (arXiv 2311.00636): "expand" takes every position as a sample,
                "reduce" averages inputs and sums gradients over positions first.

        Returns:
            Factors by the names of a layer's parameters; linear layers and ungrouped convolutions have them.

        Raises:
            InvalidOptionError: If ``sharing`` is something else.
        """
        check_choice("sharing", sharing, ("expand", "reduce"))
        factors = {record.names: record.kronecker_factors(sharing) for record in self._records}
        return {names: factor for names, factor in factors.items() if factor is not None}

    @caller_independent
    def project(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """Return ``J V^T``: every row's inner products with L vectors in parameter space, such as those of a sketch.

        Where each row meets a linear layer once, no gradient of a row is formed.

        Args:
            vectors: ``[L, *shape]`` or ``[L, numel]`` for every name in `names`, and for no other.

        Returns:
            ``[R, L]``.

        Raises:
            InvalidOptionError: If the vectors belong to other parameters or have other shapes.
        """
        shaped = shaped_vectors(self._shapes, vectors)
        count = len(next(iter(shaped.values())))
        out = torch.zeros(self._num_rows, count, dtype=self._dtype, device=self._device)
        for record in self._records:
            out = out + record.project(shaped, self._max_memory)
        return out

    @caller_independent
    def squared_norms(self) -> Tensor:
        """Return the squared norm of every row, without gradients where each row meets a linear layer once.

        Returns:
            ``[R]`` in float64, which holds the square of any float32.
        """
        out = torch.zeros(self._num_rows, dtype=torch.float64, device=self._device)
        for record in self._records:
            out += record.squared_norms(self._max_memory)
        return out

    @caller_independent
    def layer_rows(self, weight: str) -> tuple[Tensor, Tensor]:
        """Return what a linear layer or an ungrouped convolution saw: its gradients are sums of ``g_ns x_ns^T``.

        Args:
            weight: Qualified name of its weight.

        Returns:
            Inputs ``[R, S, d_in (+ 1)]`` with a 1 joined where the bias is differentiated too, and the gradients of
            its outputs ``[R, S, d_out]``, for S positions that share the weight.

        Raises:
            InvalidOptionError: If the rows have no such parameter.
            UnsupportedModelError: If its layer has no such form, or is no layer of its own.
        """
        return layer_positions(self._records, self._shapes, weight)

    @caller_independent
    def sketch_into(self, sketch: RowSketch) -> None:
        """Feed the rows to a streaming sketch, one block per parameter and never one flat copy.

        Gradients are made of no more rows at a time than ``sketch.sketch_size``, where it has one, and `max_memory`.

        Args:
            sketch: Whatever takes the rows of many batches, such as `FrequentDirections`.
        """
        row_bytes = sum(record.row_bytes() for record in self._records)
        most = min(getattr(sketch, "sketch_size", self._num_rows), self._max_memory // max(1, row_bytes))
        for start in range(0, self._num_rows, max(1, most)):
            rows = slice(start, min(start + max(1, most), self._num_rows))
            taken = [record.take(rows).per_sample_grads() for record in self._records]
            grads = self._complete(taken, (rows.stop - rows.start,))
            sketch.insert({name: as_rows(grad) for name, grad in grads.items()})

    def restrict(self, index: Mapping[str, Tensor]) -> "Jacobian":
        """Keep some output rows (dimension 0) of the parameters: fewer columns, less memory and time.

        Args:
            index: For each parameter to be cut, the integer indices to keep; parameters that share a layer
                (weight and bias) must be given the same indices. Use `sample_outputs` to draw them.

        Returns:
            The Jacobian of the kept columns, whose `shapes` are the kept ones.
        """
        records = [r.restrict(index) if index.keys() & set(r.names) else r for r in self._records]
        kept = {name: shape for r in records for name, shape in r.shapes.items()}
        shapes = {name: kept.get(name, shape) for name, shape in self._shapes.items()}
        return Jacobian(records, shapes, self._num_rows, self._max_memory, self._device, self._dtype)

    def sample_outputs(self, fraction: float, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw a random fraction of every layer's output rows, at least one of each.

        Args:
            fraction: In (0, 1].
            generator: Source of randomness, on the CPU.

        Returns:
            Sorted indices for each parameter that the rows use; scalars are always kept.
        """
        drawn: dict[str, Tensor] = {}
        for record in self._records:
            for names in record.coupled():
                total = self._shapes[names[0]][0] if self._shapes[names[0]] else 1
                kept = max(1, round(fraction * total))
                index = torch.randperm(total, generator=generator)[:kept].sort().values.to(self._device)
                drawn |= dict.fromkeys(names, index)
        return drawn

    def _complete(self, parts: Sequence[Mapping[str, Tensor]], lead: tuple[int, ...]) -> dict[str, Tensor]:
        found = {name: tensor for part in parts for name, tensor in part.items()}
        return {
            name: found[name] if name in found
            else torch.zeros((*lead, *shape), dtype=self._dtype, device=self._device)
            for name, shape in self._shapes.items()
        }  # fmt: skip
