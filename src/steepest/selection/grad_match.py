"""GradMatch: weighted samples whose gradients add up to the mean gradient of all."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from steepest._validation import check_integer, check_real
from steepest.engine.jacobian import caller_independent
from steepest.errors import InvalidOptionError
from steepest.selection.features import DEFAULT_MEMORY, TableRun
from steepest.selection.method import Method, Picked, Rows, Scope
from steepest.selection.pursuit import pursue
from steepest.selection.quotas import ALL, ClassPolicy, check_policy, quotas
from steepest.selection.rules import seeded

if TYPE_CHECKING:
    from steepest.selection.together import Together

__all__ = ["GradMatch"]


@dataclass(frozen=True)
class GradMatch(Method):
    r"""Keep samples, with weights, whose gradients in the last layer match the mean gradient of their class.

    In every group, orthogonal matching pursuit (Killamsetty et al., arXiv 2103.00123) with weights that are never
    negative minimises

    .. math:: \Big\| \tfrac1n \sum_i g_i - \sum_{j\ \mathrm{kept}} w_j g_j \Big\|^2 + \lambda \| w \|^2

    with the whole gradient :math:`g = e\,[h, 1]^T` of the layer, from its inputs h and output gradients e, which is
    exact where each sample uses the layer once. Where a sample uses it at many positions, g is approximated by
    the sum of e times the mean of h; the result says so. Released code uses less: of e only the entry of the sample's
    own class, and so only H + 1 numbers of g.

    One pass; N x (H + 1 + C) float32 numbers. Choosing k of n takes k products of all gradients with one, and a
    Cholesky factor of 8 k^2 bytes that gains a row each step.

    Where the mean is matched before a group's share is full, or no gradient left points along what is missing, the
    rest of the share is drawn at random from the group, each with the mean weight of the matched: their mean gradient
    is that of the group on average. So a class whose gradients are all zero is drawn at random. A group kept whole
    gets equal weights, which match its mean exactly.

    Weights of a group add up to its share of the data, so that the kept samples stand for the mean gradient of all
    data whatever the class policy; their mean over all kept samples is 1. Scores: inner product of every sample's
    gradient with its group's mean gradient over the norm of the latter. The report's numbers: ``residual``, what is
    left of the mean gradient in the worst group, relative to it; ``matched`` and ``at_random``, how many samples came
    either way; ``dropped``, how many left again as their weights would have been negative.

    Args:
        class_policy: "auto" is "balanced" where labels exist, else "global"; see `quotas`.
        ridge: :math:`\lambda` over the mean square norm of the group's gradients, so that a factor of the loss
            changes nothing; in the paper :math:`\lambda` itself is 0.5.
        tolerance: Residual, relative to the mean gradient, at which a group counts as matched.
        seed: Of the random rest.
        max_memory: Bytes that the numbers of all samples may take, and the Cholesky factor of a group.
        scope: Whose last layer: "last", "all" or names of modules.

    Raises:
        InvalidOptionError: If an option has an impossible value.
    """

    name: ClassVar[str] = "grad-match"

    class_policy: ClassPolicy = "auto"
    ridge: float = 0.5
    tolerance: float = 1e-4
    seed: int = 0
    max_memory: int = DEFAULT_MEMORY
    scope: Scope = "last"

    def __post_init__(self) -> None:
        check_policy(self.class_policy)
        check_real("ridge", self.ridge, low=0)
        check_real("tolerance", self.tolerance, low=0)
        check_integer("seed", self.seed, low=0)
        check_integer("max_memory", self.max_memory, low=1)

    def begin(self) -> "_GradMatchRun":
        """Start a selection."""
        return _GradMatchRun(self)


class _GradMatchRun(TableRun):
    """One selection: inputs and output gradients of the last layer, side by side in one row for each sample."""

    def __init__(self, method: GradMatch) -> None:
        super().__init__(type(method).__name__, method.class_policy, method.max_memory)
        self._method = method
        self._num_inputs = 0
        self._positions = 1

    def join(self, number: int, together: "Together") -> None:
        """Bring the rows of all processes to every one of them, and what their columns are.

        Args:
            number: Always 0.
            together: The processes.
        """
        told = together.told((self._num_inputs, self._positions))
        self._num_inputs, self._positions = (max(column) for column in zip(*told, strict=True))
        super().join(number, together)

    def row_of(self, rows: Rows) -> Tensor:
        """Inputs with the 1 of the bias, then output gradients."""
        inputs, errors = rows.jacobian.layer_rows(rows.last)
        self._num_inputs, self._positions = inputs.shape[2], max(self._positions, inputs.shape[1])
        return torch.cat([inputs.mean(1), errors.sum(1)], 1)

    def afford(self, count: int, labels: Tensor | None) -> None:
        """Refuse a choice for which memory does not suffice.

        Args:
            count: How many samples.
            labels: ``[N]`` or None.

        Raises:
            InvalidOptionError: If a group's Cholesky factor would not fit into the memory allowed.
        """
        largest = max(quotas(labels, count, self._method.class_policy).values())
        if 8 * largest**2 > self._method.max_memory:
            raise InvalidOptionError(
                f"GradMatch would choose {largest} samples of one group, and its Cholesky factor takes "
                f"{8 * largest**2} bytes where max_memory={self._method.max_memory}: divide the samples by class "
                '(class_policy="balanced", with labels), keep fewer, or raise max_memory.'
            )

    @caller_independent
    def pick(self, count: int, labels: Tensor | None) -> Picked:
        """Match the mean of every group.

        Args:
            count: How many samples.
            labels: ``[N]`` or None.

        Returns:
            The choice.
        """
        self.afford(count, labels)
        scores = torch.zeros(self.table.num_rows, dtype=torch.float32, device="cpu")
        weights = torch.zeros(self.table.num_rows, dtype=torch.float64, device="cpu")
        numbers = {"residual": 0.0, "matched": 0.0, "at_random": 0.0, "dropped": 0.0}
        generator = seeded(self._method.seed, ALL)
        for members, quota in self.shares(count, labels):
            told = self.telling(int(numbers["matched"] + numbers["at_random"]), count)
            self._match(members, quota, generator, scores, weights, numbers, told)
        chosen = weights.nonzero().squeeze(1)
        kept = weights[chosen]
        return Picked(chosen, scores, (kept / kept.mean()).float(), self._notes(numbers), numbers)

    def _match(
        self,
        members: Tensor,
        quota: int,
        generator: torch.Generator,
        scores: Tensor,
        weights: Tensor,
        numbers: dict[str, float],
        told: Callable[[int], None],
    ) -> None:
        """Choose in one group, and write down what was found."""
        inputs, errors = self.table.gather(members).tensor_split([self._num_inputs], dim=1)
        whole = quota == len(members)  # equal weights match the mean
        found = pursue(
            inputs,
            errors,
            0 if whole else quota,
            ridge=self._method.ridge,
            tolerance=self._method.tolerance,
            told=told,
        )
        share = torch.zeros(len(members), dtype=torch.float64, device="cpu")
        if len(found.chosen):
            share[found.chosen] = found.weights / found.weights.mean()
        others = (share == 0).nonzero().squeeze(1)
        drawn = torch.randperm(len(others), generator=generator, device="cpu")[: quota - len(found.chosen)]
        share[others[drawn]] = 1.0
        weights[members] = share * (len(members) / quota)
        scores[members] = found.projections
        numbers["matched"] += quota if whole else len(found.chosen)
        if not whole:
            numbers["residual"] = max(numbers["residual"], found.residual)
            numbers["at_random"] += len(drawn)
            numbers["dropped"] += found.dropped

    def _notes(self, numbers: Mapping[str, float]) -> tuple[str, ...]:
        notes = []
        if numbers["at_random"]:
            notes.append(
                f"{numbers['at_random']:.0f} samples were drawn at random, each with the mean weight of its group: "
                "the mean gradient was matched before, or no gradient left pointed along the rest."
            )
        if self._positions > 1:
            notes.append(
                f"The last layer is used at up to {self._positions} positions of a sample: its gradient was "
                "approximated by the sum of output gradients times the mean of inputs."
            )
        return tuple(notes)

    def state_dict(self) -> dict[str, Any]:
        """The rows so far, and what their columns are."""
        return super().state_dict() | {"num_inputs": self._num_inputs, "positions": self._positions}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a state."""
        super().load_state_dict(state)
        self._num_inputs, self._positions = state["num_inputs"], state["positions"]

    def resume(
        self, number: int, common: Mapping[str, Any], shares: Sequence[tuple[Mapping[str, Any], Tensor]]
    ) -> None:
        """Go on with the rows of some processes, and what their columns are."""
        super().resume(number, common, shares)
        for state, _ in shares:
            self._num_inputs = max(self._num_inputs, state["num_inputs"])
            self._positions = max(self._positions, state["positions"])
