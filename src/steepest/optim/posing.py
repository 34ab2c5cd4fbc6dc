"""From the closure of a step to the system that it solves."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from steepest.distributed.ranks import Ranks
from steepest.engine import Capture, Jacobian, ReferenceCapture, Rows
from steepest.errors import ClosureError, NonFiniteError
from steepest.linalg.factors import DecompositionError
from steepest.optim.choices import Choices
from steepest.optim.memory import Memory
from steepest.optim.rows import check_weights, conditions, mean_loss, row_values, sample_sizes, weighted
from steepest.optim.sets import columns
from steepest.optim.system import System, stacked
from steepest.optim.together import Conditions, Shared
from steepest.optim.trials import random_state, repeated

__all__ = ["Batch", "alone", "pose"]


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch, as a step asks for it: differentiated once, and looked at again where the step is tried out.

    Args:
        closure: The user's.
        capture: The engine.
        wrapper: What is around the model, if anything.
        choices: The options.
        random: Where the random generators were, of a batch that is looked at again.
    """

    closure: Callable[[], Rows] | None
    capture: Capture | ReferenceCapture
    wrapper: DistributedDataParallel | None
    choices: Choices
    random: list[tuple[torch.device, Tensor]]

    @classmethod
    def of(
        cls,
        closure: Callable[[], Rows] | None,
        capture: Capture | ReferenceCapture,
        wrapper: DistributedDataParallel | None,
        choices: Choices,
    ) -> "Batch":
        """Begin a step.

        Args:
            closure: The user's.
            capture: The engine.
            wrapper: What is around the model, if anything.
            choices: The options.

        Returns:
            The batch.
        """
        return cls(closure, capture, wrapper, choices, random_state(capture.params.values()) if choices.tries else [])

    def conditions(self) -> Conditions:
        """Run the closure once, and one backward."""
        closure, choices = self._given(), self.choices
        with torch.enable_grad():
            with self._quiet(), self.capture:
                output = closure()
            output = weighted(output, choices.weights, choices.rows)
            rows = conditions(output, choices.rows, choices.kappa, choices.samples_per_row)
        return Conditions(output, self.capture.jacobian(rows), stacked(rows), sample_sizes(rows))

    def rows(self) -> Tensor:
        """The rows of the same batch once more, at the parameters as they are."""
        closure, choices = self._given(), self.choices
        # With gradients, which a closure may need for its own derivatives.
        with torch.enable_grad(), self._quiet(), repeated(self.random):
            output = weighted(closure(), choices.weights, choices.rows)
        return row_values(output, choices.rows, choices.kappa, choices.samples_per_row)

    def _given(self) -> Callable[[], Rows]:
        if self.closure is None:
            raise ClosureError(
                "Sven.step() needs a closure that returns the unreduced losses: "
                "opt.step(lambda: loss_fn(model(x), y)) with reduction='none'."
            )
        return self.closure

    def _quiet(self) -> contextlib.AbstractContextManager[object]:
        """A wrapper called in the closure would wait for gradients that never come."""
        return contextlib.nullcontext() if self.wrapper is None else self.wrapper.no_sync()


def alone(batch: Batch) -> Shared:
    """The conditions of a batch that one process has.

    Args:
        batch: The batch.

    Returns:
        Its conditions in the form that those of several processes have.
    """
    found = batch.conditions()
    check_weights(batch.choices.weights, found.output if isinstance(found.output, Mapping) else ())
    loss = mean_loss(found.output, batch.choices.rows)
    return Shared(found.jacobian, found.rhs, loss, found.samples, [count for count, _ in found.samples])


def pose(
    shared: Shared, choices: Choices, memory: Memory, trained: Mapping[str, Tensor], ranks: Ranks | None
) -> System:
    """Bring the conditions of a batch to the parameters and coordinates that they are solved in.

    Args:
        shared: The conditions, of all processes.
        choices: The options.
        memory: What earlier steps left.
        trained: The parameters that Sven trains, by name.
        ranks: The processes.

    Returns:
        The system.

    Raises:
        NonFiniteError: If the gradients hold NaN or infinity, so that there is no metric.
    """
    jacobian, rhs = shared.jacobian, shared.rhs
    if len(trained) < len(jacobian.names):
        jacobian = columns(jacobian, list(trained))
    decay = choices.relative_decay and choices.relative_decay * _lack(jacobian, trained, rhs)
    index, jacobian = _restricted(jacobian, choices, memory["step"])
    geometry = None
    if choices.metric is not None:
        try:
            geometry = choices.metric.geometry(memory.layers(), jacobian, ranks)
        except DecompositionError as error:  # of sums over all processes: it is raised on all of them
            raise NonFiniteError(
                f"The batch has no metric; parameters and optimizer state are unchanged. {error}"
            ) from error
    previous = memory.previous(jacobian, index) if choices.momentum else None
    if previous is not None:
        rhs = rhs - choices.momentum * jacobian.jvp(previous).to(rhs)
    return System(
        shared.jacobian, jacobian, geometry, rhs, shared.samples, shared.totals, index, previous, shared.loss,
        shared.rhs, decay,
    )  # fmt: skip


def _lack(jacobian: Jacobian, params: Mapping[str, Tensor], rhs: Tensor) -> float:
    """What the conditions lack, against what they would lose with all of the parameters: ``|R|^2 / |J theta|^2``."""
    # Squares: a decay in proportion to |R| would hold up whatever a step mends by less than that proportion.
    lost = jacobian.jvp({name: params[name].detach() for name in jacobian.names}).double().square().sum()
    return min(1.0, float(rhs.double().square().sum() / lost.clamp(min=torch.finfo(torch.float64).tiny)))


def _restricted(jacobian: Jacobian, choices: Choices, step: int) -> tuple[dict[str, Tensor], Jacobian]:
    """Choose this step's random output rows; the choice follows from seed and step, so a resumed run repeats it."""
    if choices.fraction == 1:
        return {}, jacobian
    generator = torch.Generator().manual_seed(choices.seed * 1_000_003 + step)
    index = jacobian.sample_outputs(choices.fraction, generator)
    return index, jacobian.restrict(index)
