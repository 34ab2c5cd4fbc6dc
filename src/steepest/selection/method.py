"""What a selection method is: passes over per-sample rows in the data's own order, then a choice."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from steepest.engine import Jacobian
from steepest.errors import InvalidOptionError

if TYPE_CHECKING:
    from steepest.selection.together import Together

__all__ = ["Method", "Picked", "Rows", "Run", "Scope"]

Scope = str | tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Rows:
    """One batch of samples as a method sees it: the model is fixed and in eval mode, the order the data's own.

    Args:
        indices: ``[B]``, int64 on the CPU: positions in the data.
        labels: ``[B]``, int64 on the CPU; None where the data has no whole-number labels.
        losses: ``[B]``, detached, on the model's device.
        jacobian: Of the losses in the parameters of the method's scope.
        last: Qualified name of the weight of the last layer in the scope, whose inputs and output gradients
            `Jacobian.layer_rows` gives.
    """

    indices: Tensor
    labels: Tensor | None
    losses: Tensor
    jacobian: Jacobian
    last: str


@dataclass(frozen=True, eq=False)
class Picked:
    """What a method chose.

    Args:
        indices: ``[k]``, int64, ascending, on the CPU.
        scores: ``[N]``, float32: the method's number for every sample, kept or not; None where it has none.
        weights: ``[k]``, float32 with mean 1, in the order of ``indices``.
        notes: What a user should be told, a sentence each.
        numbers: Measured by the way, for the report.
    """

    indices: Tensor
    scores: Tensor | None
    weights: Tensor
    notes: tuple[str, ...] = ()
    numbers: Mapping[str, float] = field(default_factory=dict)


def _silent(done: int, total: int) -> None:
    """What a run tells where nobody listens."""


class Run(ABC):
    """One selection under way. All that it has learnt is in its state, so that it can be interrupted and go on.

    Attributes:
        passes: How many times it goes through the data.
        tell: For a choice that takes one sample after another to call with how many it has and how many it takes;
            whoever drives the run sets it, to show that or to end the choice by an error.
        shared: Whether several processes read a part of the data each, so that this run does not see all batches.
        merges: Whether `resume` takes what any number of processes had learnt. Where it does not, and another number
            of them goes on, the pass under way is begun anew.
    """

    passes: int
    shared: bool = False
    merges: bool = False
    tell: Callable[[int, int], None] = staticmethod(_silent)

    @abstractmethod
    def update(self, number: int, rows: Rows) -> None:
        """Take the next batch of pass ``number``, counted from 0."""

    def end_pass(self, number: int) -> None:  # noqa: B027 (most have nothing to conclude)
        """Conclude pass ``number``."""

    def join(self, number: int, together: "Together") -> None:
        """Conclude pass ``number`` where several processes read a part of the data each, in place of `end_pass`.

        All must know the same afterwards, in the data's own order.

        Args:
            number: The pass, counted from 0.
            together: The processes, with the positions that each of them read.

        Raises:
            InvalidOptionError: If the method cannot.
        """
        del number, together
        raise InvalidOptionError(
            f"{type(self).__name__} does not say how several processes join what each of them learnt: give it a method "
            "join(), or select in one process alone, with alone=True."
        )

    def reads(self, number: int) -> Literal["data", "reference"]:
        """What pass ``number`` goes through: the data to choose from, or the reference set."""
        del number
        return "data"

    def effort(self, number: int) -> float:
        """What `update` costs in pass ``number`` over what it costs in the first: above 0, for the estimate alone."""
        del number
        return 1.0

    def telling(self, before: int, total: int) -> Callable[[int], None]:
        """Return what a choice in one group calls with how many it has there, after ``before`` in other groups."""
        return lambda done: self.tell(before + done, total)

    @abstractmethod
    def pick(self, count: int, labels: Tensor | None) -> Picked:
        """Choose ``count`` samples after the last pass; ``labels`` are those of all samples, ``[N]``."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything learnt so far, in tensors and plain values that `torch.load(weights_only=True)` reads."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a state."""

    def divided(self, number: int, positions: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
        """Take `state_dict` apart in the midst of pass ``number``.

        Args:
            number: The pass, counted from 0.
            positions: ``[n]``: the samples that this process has read in it, in the order in which it did.

        Returns:
            What all processes know alike, and what this one alone has learnt in the pass.
        """
        del number, positions
        return {}, self.state_dict()

    def resume(
        self, number: int, common: Mapping[str, Any], shares: Sequence[tuple[Mapping[str, Any], Tensor]]
    ) -> None:
        """Go back into the midst of pass ``number``, with what some processes had learnt in it.

        Args:
            number: The pass, counted from 0.
            common: What all of them knew alike.
            shares: What each of them alone had learnt and the samples that it had read, in the order of their ranks:
                exactly one where the run does not merge, else of none, one or several.
        """
        del number, common
        for state, _ in shares:
            self.load_state_dict(state)


class Method(ABC):
    """A way to choose, with its options: children are frozen dataclasses.

    Attributes:
        name: Name on the command line.
        scope: Whose gradients it looks at: "last" (the last layer with a weight that the model calls), "all", or
            qualified names of modules.
    """

    name: ClassVar[str]
    scope: Scope

    @abstractmethod
    def begin(self) -> Run:
        """Start a selection."""
