"""Running curvature of one layer: what a step gathers, what stays of it, and its decomposition."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steepest._typing import Sharing
from steepest.engine.records import Record
from steepest.linalg.decompositions import CorrectedEigen, Decomposition
from steepest.linalg.kronecker import KroneckerSolver

__all__ = ["CURVATURE_KEYS", "Curvature", "Gathered"]

_KEPT = ("input_factor", "grad_factor", "weight", "age", "updates", "failures")
CURVATURE_KEYS = (*_KEPT, "decomposition")
# After so many failed decompositions in a row the basis in use is too old to go on with.
_MAX_FAILURES = 3


class Gathered:
    """Sums over the samples of one step, from one backward or several."""

    def __init__(self) -> None:
        self.input: Tensor | None = None
        self.grad: Tensor | None = None
        self.moment: Tensor | None = None
        self.positions = 0

    def add(self, record: Record, sharing: Sharing, weight: float, decomposition: Decomposition | None) -> None:
        """Add the inputs and output gradients of a batch.

        Args:
            record: One use of the layer.
            sharing: How positions that share the weight are treated.
            weight: Weight of the gradients' outer products.
            decomposition: The one in use; if it learns from gradients, their squares in its basis are summed too.
        """
        factors = record.kronecker_factors(sharing)
        if factors is None or not factors.positions:  # of no positions there is no mean
            return
        self.positions += factors.positions
        self.input = _plus(self.input, factors.input_factor, factors.positions)
        self.grad = _plus(self.grad, factors.grad_factor, record.num_rows * weight)
        if isinstance(decomposition, CorrectedEigen):
            # The gradients themselves, whatever the factors make of positions.
            moment = record.second_moment(decomposition.grad_basis, decomposition.input_basis)
            self.moment = _plus(self.moment, moment, record.num_rows * weight)

    def sizes(self) -> list[Tensor]:
        """One number for every sum, not finite where the sum is not."""
        return [torch.linalg.vector_norm(part) for part in (self.input, self.grad, self.moment) if part is not None]


def _plus(total: Tensor | None, part: Tensor, weight: float) -> Tensor:
    # Both were made for this sum alone.
    return part.mul_(weight) if total is None else total.add_(part, alpha=weight)


@dataclass(frozen=True, eq=False)
class Curvature:
    """The running factors of a layer. It is never changed: an update makes a new one, which a step keeps or drops.

    Args:
        input_factor: Sum of past A with falling weights; `corrected` divides by the weights.
        grad_factor: Likewise of S.
        weight: Sum of the weights: 1 - factor_decay ** k after k updates at one decay.
        decomposition: The decomposition in use, None before the first, and where another process keeps it.
        age: Updates since the factors were decomposed.
        updates: Updates so far.
        failures: Decompositions that failed in a row.
    """

    input_factor: Tensor
    grad_factor: Tensor
    weight: float
    decomposition: Decomposition | None = None
    age: int = 0
    updates: int = 0
    failures: int = 0

    @staticmethod
    def updated(before: "Curvature | None", gathered: Gathered, decay: float, grad_scale: float) -> "Curvature":
        """Blend the sums of a step in.

        Args:
            before: The curvature so far.
            gathered: The sums; they stay as they are, so that a step that fails later can be tried again.
            decay: Share of the past.
            grad_scale: What the sums of gradients are to be multiplied with to be means over samples.

        Returns:
            The new curvature.

        Raises:
            RuntimeError: If nothing was gathered.
        """
        if gathered.input is None or gathered.grad is None:
            raise RuntimeError("nothing was gathered")
        a, s = gathered.input * ((1 - decay) / gathered.positions), gathered.grad * ((1 - decay) * grad_scale)
        if before is None:
            return Curvature(a, s, 1 - decay, age=1, updates=1)
        decomposition = before.decomposition
        if isinstance(decomposition, CorrectedEigen) and gathered.moment is not None:
            decomposition = decomposition.blended(gathered.moment * grad_scale, decay)
        return Curvature(
            a.add_(before.input_factor, alpha=decay),
            s.add_(before.grad_factor, alpha=decay),
            decay * before.weight + 1 - decay,
            decomposition,
            before.age + 1,
            before.updates + 1,
            before.failures,
        )

    @staticmethod
    def unknown() -> "Curvature":
        """A placeholder where something went wrong, which no step uses."""
        return Curvature(torch.empty(0), torch.empty(0), 1.0)

    @property
    def basis(self) -> Decomposition:
        """The decomposition in use.

        Raises:
            RuntimeError: Before the first.
        """
        if self.decomposition is None:
            raise RuntimeError("a curvature was used before it was decomposed")
        return self.decomposition

    @staticmethod
    def is_stale(age: int, updates: int, period: int) -> bool:
        """Whether factors are to be decomposed again, which all processes tell from these numbers alone.

        The first factors are one batch's, so the first decompositions are renewed sooner: after the 1st, 2nd, 4th,
        8th, ... update, until the period is reached.

        Args:
            age: Updates since they were decomposed.
            updates: Updates so far.
            period: Updates between two decompositions.

        Returns:
            Whether it is time.
        """
        return age >= min(period, (updates + 1) // 2)

    def decompose(self, solver: KroneckerSolver, damping: float | Tensor) -> Decomposition:
        """Decompose the factors.

        Args:
            solver: How.
            damping: For solvers that damp before they decompose.

        Returns:
            The decomposition, to be taken up by `renewed`.
        """
        return solver.decompose(
            self.input_factor / self.weight, self.grad_factor / self.weight, damping, self.decomposition
        )

    def renewed(self, found: Decomposition | None) -> "Curvature":
        """Take up a new decomposition; None where another process keeps it."""
        return replace(self, decomposition=found, age=0, failures=0)

    def without_decomposition(self) -> "Curvature":
        """Leave the decomposition to another process."""
        return self if self.decomposition is None else replace(self, decomposition=None)

    @property
    def may_fail(self) -> bool:
        """Whether there is a good decomposition, and not too old a one, to go on with."""
        return self.decomposition is not None and self.failures + 1 < _MAX_FAILURES

    def failed(self) -> "Curvature":
        """Go on with the last good decomposition."""
        return replace(self, failures=self.failures + 1)

    def state(self) -> dict[str, Any]:
        """What a state_dict keeps."""
        kept = {name: getattr(self, name) for name in _KEPT}
        return kept | {"decomposition": {} if self.decomposition is None else self.decomposition.tensors()}

    @staticmethod
    def from_state(state: Mapping[str, Any], solver: KroneckerSolver) -> "Curvature | None":
        """Make it again from what a state_dict kept.

        Args:
            state: A state that may hold other things too.
            solver: The solver that made it.

        Returns:
            The curvature, or None if there is none in the state.
        """
        if "input_factor" not in state:
            return None
        tensors = state["decomposition"]
        return Curvature(
            **{name: state[name] for name in _KEPT}, decomposition=solver.restore(tensors) if tensors else None
        )
