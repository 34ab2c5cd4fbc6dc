"""The Jacobian of a batch whose rows lie on several processes."""

from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn, TypeVar

import torch
from torch import Tensor

from steepest._typing import Precision, Sharing
from steepest._validation import check_choice
from steepest.distributed.agreement import fail_together, tell
from steepest.distributed.ranks import Ranks
from steepest.distributed.records import gathered_gram, spans
from steepest.engine import Jacobian
from steepest.engine.jacobian import RowSketch, caller_independent
from steepest.engine.records import KroneckerFactors
from steepest.errors import InvalidOptionError

__all__ = ["SpreadJacobian", "own_rows"]

T = TypeVar("T")


class SpreadJacobian(Jacobian):
    """All rows of all ranks as one Jacobian: rank 0's first, each rank's in their own order.

    Every rank must call the same methods in the same order; all get the same numbers. Where one fails, all do.

    Args:
        local: This rank's rows, with the same records as on the other ranks (see `align`).
        ranks: The ranks.
        counts: Number of rows of every rank.
    """

    def __init__(self, local: Jacobian, ranks: Ranks, counts: Sequence[int]) -> None:
        super().__init__(local.records, local.shapes, sum(counts), local.max_memory, local.device, local.dtype)
        self._local, self._ranks, self._counts = local, ranks, tuple(counts)
        self._own = spans(counts)[ranks.rank]

    @property
    def local(self) -> Jacobian:
        """This rank's rows."""
        return self._local

    @property
    def own(self) -> slice:
        """Where this rank's rows lie among those of all."""
        return self._own

    @property
    def ranks(self) -> Ranks:
        """The ranks."""
        return self._ranks

    def with_local(self, local: Jacobian) -> "SpreadJacobian":
        """Take other columns, which every rank has made in the same way and without failing.

        Args:
            local: A Jacobian of this rank's rows.

        Returns:
            The Jacobian of all rows.
        """
        return SpreadJacobian(local, self._ranks, self._counts)

    def mapped(self, change: Callable[[Jacobian], Jacobian]) -> "SpreadJacobian":
        """Change the columns of every rank's rows in the same way.

        Args:
            change: Gives a Jacobian of the same rows.

        Returns:
            The Jacobian of all rows.
        """
        return self.with_local(self._alike(lambda: change(self._local)))

    @caller_independent
    def gram(self, precision: Precision = "float64") -> Tensor:
        """Return ``J J^T`` of all rows, see `gathered_gram`.

        Args:
            precision: Precision of products and accumulation.

        Returns:
            ``[R, R]`` in that precision.
        """
        check_choice("precision", precision, ("float64", "float32"))
        dtype = torch.float64 if precision == "float64" else torch.float32
        return gathered_gram(self._local, self._ranks, self._counts, dtype)

    @caller_independent
    def normal_equations(self, rhs: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return ``J^T J`` and ``J^T r``: two sums over the ranks.

        Args:
            rhs: r, ``[R]``.
            dtype: dtype of the products.

        Returns:
            ``[P, P]`` and ``[P]``.
        """
        matrix, projected = self._alike(lambda: self._local.normal_equations(rhs[self._own], dtype))
        self._ranks.sum_([matrix, projected])
        return matrix, projected

    def per_sample_grads(self) -> dict[str, Tensor]:
        """Return the gradient of every row, gathered: of the whole batch on every rank."""
        grads = self._alike(self._local.per_sample_grads)
        return {name: torch.cat(self._ranks.gather(grad)) for name, grad in grads.items()}

    def vjp(self, weights: Tensor) -> dict[str, Tensor]:
        """Return ``J^T w``: every rank's part, summed in one go.

        Args:
            weights: ``[R]``.

        Returns:
            One tensor for each parameter, the same on all ranks to the bit.
        """
        self._check_weights(weights)
        failure: Exception | None = None
        try:
            parts = self._local.vjp(weights[self._own])
        except Exception as error:
            failure = error
            parts = {n: torch.zeros(s, dtype=self._dtype, device=self._device) for n, s in self._shapes.items()}
        failures = torch.full((1,), float(failure is not None), dtype=torch.float64, device=self._device)
        self._ranks.sum_([*parts.values(), failures])
        if failures.item() > 0:
            fail_together(self._ranks, failure)
        return parts

    def add_vjp_(self, targets: Mapping[str, Tensor], weights: Tensor, alphas: Mapping[str, float]) -> None:
        """Add ``alpha J^T w`` to tensors in place.

        Args:
            targets: The tensor to change for each parameter.
            weights: ``[R]``.
            alphas: A factor for each parameter.
        """
        product = self.vjp(weights)
        with torch.no_grad():
            for name, tensor in product.items():
                targets[name].add_(tensor, alpha=alphas[name])

    def jvp(self, vector: Mapping[str, Tensor]) -> Tensor:
        """Return ``J v``, gathered.

        Args:
            vector: A tensor for every parameter, the same on all ranks.

        Returns:
            ``[R]``.
        """
        return torch.cat(self._ranks.gather(self._alike(lambda: self._local.jvp(vector))))

    def project(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """Return ``J V^T``, gathered.

        Args:
            vectors: ``[L, *shape]`` for every parameter, the same on all ranks.

        Returns:
            ``[R, L]``.
        """
        return torch.cat(self._ranks.gather(self._alike(lambda: self._local.project(vectors))))

    def squared_norms(self) -> Tensor:
        """Return the squared norm of every row, gathered."""
        return torch.cat(self._ranks.gather(self._alike(self._local.squared_norms)))

    def restrict(self, index: Mapping[str, Tensor]) -> "SpreadJacobian":
        """Keep some output rows of the parameters.

        Args:
            index: As for one process, the same on all ranks.

        Returns:
            The Jacobian of the kept columns.
        """
        return self.mapped(lambda local: local.restrict(index))

    def cross_gram(self, other: Jacobian, precision: Precision = "float64") -> NoReturn:
        """Refuse."""
        self._refuse("cross_gram")

    def kronecker_factors(self, sharing: Sharing = "expand") -> dict[tuple[str, ...], KroneckerFactors]:
        """Refuse."""
        self._refuse("kronecker_factors")

    def layer_rows(self, weight: str) -> tuple[Tensor, Tensor]:
        """Refuse."""
        self._refuse("layer_rows")

    def sketch_into(self, sketch: RowSketch) -> None:
        """Refuse."""
        self._refuse("sketch_into")

    def _refuse(self, method: str) -> NoReturn:
        raise InvalidOptionError(
            f"Jacobian.{method} has no form for rows on {self._ranks.size} processes: use one process, or a solver "
            "that is made of gram, to_dense, vjp, jvp and normal_equations."
        )

    def _alike(self, compute: Callable[[], T]) -> T:
        """Do this rank's part, and fail on all ranks where it fails on one."""
        failure: Exception | None = None
        result: T | None = None
        try:
            result = compute()
        except Exception as error:
            failure = error
        tell(self._ranks, None, failure)
        return result  # type: ignore[return-value]


def own_rows(jacobian: Jacobian, rows: Tensor) -> Tensor:
    """What this process has of numbers that belong to all rows.

    Args:
        jacobian: Of one process, or spread over several.
        rows: ``[R]``.

    Returns:
        A part of them, or all.
    """
    return rows[jacobian.own] if isinstance(jacobian, SpreadJacobian) else rows
