"""Runs that keep a row of numbers for every sample, and what greedy methods on features share."""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steepest._validation import check_integer
from steepest.engine.jacobian import caller_independent
from steepest.selection.method import Picked, Rows, Run
from steepest.selection.quotas import ClassPolicy, groups, quotas, settled
from steepest.selection.table import Table

if TYPE_CHECKING:
    from steepest.selection.together import Together

__all__ = ["DEFAULT_MEMORY", "FeatureRun", "TableRun", "layer_inputs", "rescale_", "unheard"]

DEFAULT_MEMORY = 1 << 30

Greedy = Callable[[Tensor, int, Callable[[int], None]], tuple[Tensor, float]]


class TableRun(Run):
    """A run that keeps a row of numbers for every sample in one pass.

    The rows take 4 N W bytes; while it chooses, a copy of those of one class (or of all, where classes do not matter)
    comes on top. Several processes gather the rows of all at every one of them, whose limit is that of one process;
    meanwhile they take 8 N W bytes and what it read itself.

    Args:
        method: Name of the class of the method, for messages.
        class_policy: Class policy.
        max_memory: Bytes that the rows may take.
    """

    merges = True

    def __init__(self, method: str, class_policy: ClassPolicy, max_memory: int) -> None:
        self.passes = 1
        self.table = Table(method, check_integer("max_memory", max_memory, low=1))
        self._policy: ClassPolicy = class_policy

    @property
    def nbytes(self) -> int:
        """Bytes that the state holds, or will hold in the end where that is known."""
        return self.table.nbytes

    def expect(self, num_samples: int) -> None:
        """Say how many samples there will be: a table too large is then refused at the first batch."""
        self.table.expected = num_samples

    @caller_independent
    def update(self, number: int, rows: Rows) -> None:
        """Keep the rows of the next batch.

        Args:
            number: Always 0.
            rows: The batch.

        Raises:
            InvalidOptionError: If the policy needs labels that are not there, or memory does not suffice.
            RuntimeError: If the batch is not the next one in the data's own order.
        """
        settled(self._policy, rows.labels)  # refuses before hours of work, not after them
        first = int(rows.indices[0])
        if not self.shared and first != self.table.num_rows:
            raise RuntimeError(f"sample {first} came where {self.table.num_rows} was due")
        self.table.append(self.row_of(rows), first)

    def join(self, number: int, together: "Together") -> None:
        """Bring the rows of all processes to every one of them.

        Args:
            number: Always 0.
            together: The processes.
        """
        del number
        width = max(together.told(self.table.width))
        with together.attempt():
            own = self.table.own(width, sum(map(len, together.positions)))
        self.table.replace(together.in_order(own))

    @abstractmethod
    def row_of(self, rows: Rows) -> Tensor:
        """What to keep of a batch, ``[B, W]``."""

    def shares(self, count: int, labels: Tensor | None) -> list[tuple[Tensor, int]]:
        """Divide ``count`` samples: the positions of each group, ascending, and how many of them to keep.

        Args:
            count: How many samples to keep.
            labels: ``[N]`` or None.

        Returns:
            Groups in ascending order of class, without those that get nothing.
        """
        members = groups(labels, self._policy, self.table.num_rows)
        return [(members[key], quota) for key, quota in quotas(labels, count, self._policy).items() if quota]

    def state_dict(self) -> dict[str, Any]:
        """The rows so far."""
        return self.table.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a state."""
        self.table.load_state_dict(state)

    def resume(
        self, number: int, common: Mapping[str, Any], shares: Sequence[tuple[Mapping[str, Any], Tensor]]
    ) -> None:
        """Go on with the rows of some processes, one after the other as their samples are."""
        del number, common
        for place, (state, _) in enumerate(shares):
            if not place:
                self.load_state_dict(state)
                continue
            for block in state["blocks"]:
                self.table.append(block)


class FeatureRun(TableRun):
    """A run that chooses one sample after another by the inputs of the last layer.

    Args:
        method: Name of the class of the method, for messages.
        class_policy: Class policy.
        max_memory: Bytes that the features may take.
        greedy: From features ``[n, H]``, which it may overwrite, k, and what it calls with how many it has: positions
            ``[k]`` in order of choice, and a number that tells how good they are.
        measure: Name of that number; the report gets the largest over groups.
    """

    def __init__(
        self, method: str, class_policy: ClassPolicy, max_memory: int, *, greedy: Greedy, measure: str
    ) -> None:
        super().__init__(method, class_policy, max_memory)
        self._greedy, self._measure = greedy, measure

    def row_of(self, rows: Rows) -> Tensor:
        """Inputs of the last layer."""
        return layer_inputs(rows)

    @caller_independent
    def pick(self, count: int, labels: Tensor | None) -> Picked:
        """Choose greedily in every group.

        Args:
            count: How many samples.
            labels: ``[N]`` or None.

        Returns:
            The choice. Scores: of the k samples of a group the first has k, the last 1, and all not chosen 0.
        """
        scores = torch.zeros(self.table.num_rows, dtype=torch.float32, device="cpu")
        worst, taken = 0.0, 0
        for members, quota in self.shares(count, labels):
            order, measured = self._greedy(self.table.gather(members), quota, self.telling(taken, count))
            taken += quota
            scores[members[order]] = torch.arange(quota, 0, -1, dtype=torch.float32, device="cpu")
            worst = max(worst, measured)
        weights = torch.ones(count, dtype=torch.float32, device="cpu")
        return Picked(scores.nonzero().squeeze(1), scores, weights, numbers={self._measure: worst})


def layer_inputs(rows: Rows) -> Tensor:
    """Features of a batch: inputs of the last layer, averaged over positions that share its weight.

    Args:
        rows: The batch.

    Returns:
        ``[B, H]``, without the 1 that stands for the bias.
    """
    inputs, _ = rows.jacobian.layer_rows(rows.last)
    width = rows.jacobian.shapes[rows.last][1:].numel()
    return inputs[..., :width].mean(1)


def rescale_(matrix: Tensor) -> int:
    """Divide by a power of two in place, which rounds nothing, so that squares cannot overflow or vanish.

    Args:
        matrix: Any finite tensor; changed so that its largest entry lies in [1/2, 1).

    Returns:
        The exponent: the matrix was divided by ``2 ** exponent``; 0 for a matrix of zeros.
    """
    exponent = math.frexp(float(matrix.abs().max()))[1]
    torch.ldexp(matrix, torch.tensor(-exponent, device=matrix.device), out=matrix)
    return exponent


def unheard(done: int) -> None:
    """What a greedy choice calls where nobody wants to know how many samples it has."""
