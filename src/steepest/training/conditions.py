"""Equations as tasks: points, what must hold at each of them, and the loss that weighs the conditions.

A sample is a point. Its target `[3]` says which condition holds there, the data of it (a right-hand side, a boundary
value, a measurement), and the solution, which no training looks at: it is there for the error.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from steepest.errors import InvalidOptionError
from steepest.nn.derivatives import WithDerivatives
from steepest.nn.jets import Jet
from steepest.nn.smooth import Affine
from steepest.training.data import Shape, Splits
from steepest.training.metrics import Metric
from steepest.training.task import Task

__all__ = [
    "CONTROLLED",
    "DAMPED",
    "RELATIVE_ERROR",
    "Condition",
    "Conditions",
    "derivative_network",
    "equation_task",
    "network",
    "value",
]

# Sven's options: all conditions are there in every step, so a step can be tried out and taken back.
CONTROLLED: Mapping[str, object] = {"lr": 1.0, "rows": "residuals", "solver": {"type": "LevenbergMarquardt"}}
# Of noisy values: steps that end before the bottom, where the network would have learnt the noise.
DAMPED: Mapping[str, object] = {"lr": 0.5, "rows": "residuals", "solver": {"type": "Damped", "damping": 1e-3}}


@dataclass(frozen=True)
class Condition:
    """One kind of condition.

    Attributes:
        name: "equation", "edge", "data": for people.
        residual: What must be zero, `[B]`, given the network's jet, the data `[B]` and the unknown coefficients of the
            problem `[B, q]`.
        weight: Factor of the mean square of its residuals in the loss.
        points: How many training points it has.
    """

    name: str
    residual: Callable[[Jet, Tensor, Tensor], Tensor]
    weight: float
    points: int


class Conditions:
    r"""Weighted squares of the residuals of several kinds of conditions.

    The mean over all training points is :math:`\sum_k w_k \cdot \mathrm{mean}_k(r^2)`: the weights say how much a
    condition counts, whatever its number of points. `mean` is that on the points of any other split.

    Args:
        conditions: In the order of their numbers in the targets.
        num_inputs: Inputs of the network.
        second: Pairs of inputs for which the network gives second derivatives.
        coefficients: Number q of unknown coefficients, the last columns of the output.
    """

    name = "weighted squared residual"

    def __init__(
        self,
        conditions: Sequence[Condition],
        *,
        num_inputs: int,
        second: Sequence[tuple[int, int]] = (),
        coefficients: int = 0,
    ) -> None:
        self.conditions = tuple(conditions)
        self._num_inputs, self._pairs, self._coefficients = num_inputs, tuple(second), coefficients
        self.num_points = sum(condition.points for condition in self.conditions)

    def per_sample(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Weighted squares.

        Args:
            outputs: Columns of values and derivatives, `[B, C]`.
            targets: Condition, data and solution, `[B, 3]`.

        Returns:
            `[B]`.
        """
        return self.residuals(outputs, targets).square()

    def mean(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The weighted sum of mean squares on any split, whose conditions may have other numbers of points.

        Args:
            outputs: Columns of values and derivatives, `[B, C]`.
            targets: Condition, data and solution, `[B, 3]`.

        Returns:
            A scalar in float64; conditions without a point count nothing.
        """
        squares, kinds = self.per_sample(outputs, targets).double(), targets[:, 0].round().long()
        sums = squares.new_zeros(len(self.conditions)).index_add_(0, kinds, squares)
        counts = kinds.bincount(minlength=len(self.conditions)).clamp(min=1)
        shares = squares.new_tensor([condition.points / self.num_points for condition in self.conditions])
        return (shares * sums / counts).sum()

    def residuals(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Weighted residuals with their signs.

        Args:
            outputs: Columns of values and derivatives, `[B, C]`.
            targets: Condition, data and solution, `[B, 3]`.

        Returns:
            `[B]`.

        Raises:
            InvalidOptionError: If the outputs have no derivatives: the model is another than the task's.
        """
        parts = 1 + self._num_inputs + len(self._pairs)
        if outputs.ndim != 2 or outputs.shape[1] != parts + self._coefficients:
            raise InvalidOptionError(
                f"the model put out the shape {tuple(outputs.shape)}, and this task's conditions need "
                f"{parts + self._coefficients} columns: value, derivatives in {self._num_inputs} inputs and unknown "
                "coefficients. Wrap the network in steepest.nn.WithDerivatives, or leave out --model."
            )
        u = Jet.of_columns(outputs[:, :parts], self._num_inputs, self._pairs)
        kinds, data, unknown = targets[:, 0].round().long(), targets[:, 1], outputs[:, parts:]
        rows = [
            (condition.weight * self.num_points / condition.points) ** 0.5 * condition.residual(u, data, unknown)
            for condition in self.conditions
        ]
        return torch.stack(rows, 1).gather(1, kinds.unsqueeze(1)).squeeze(1)


def _relative_error(outputs: Tensor, targets: Tensor) -> float:
    inside = targets[:, 0] == 0
    found, wanted = outputs.detach()[inside, 0].double(), targets[inside, 2].double()
    return float(torch.linalg.vector_norm(found - wanted) / torch.linalg.vector_norm(wanted))


# Over the points of the first condition, which validation and test have on a regular grid.
RELATIVE_ERROR = Metric("relative_error", "relative L2 error", higher_is_better=False, compute=_relative_error)


def network(
    box: Sequence[tuple[float, float]], hidden: Sequence[int], activation: Callable[[], nn.Module] = nn.Tanh
) -> nn.Sequential:
    """Inputs scaled to [-1, 1], linear layers with a smooth activation between them, one output; in float64.

    Args:
        box: Lowest and highest value of every input.
        hidden: Width of every hidden layer.
        activation: Makes the activation.

    Returns:
        The network, with torch's default initialisation.
    """
    scale = [2 / (high - low) for low, high in box]
    layers: list[nn.Module] = [Affine(scale, [-1 - s * low for s, (low, _) in zip(scale, box, strict=True)])]
    for before, after in pairwise((len(box), *hidden, 1)):
        layers += [nn.Linear(before, after, dtype=torch.float64), activation()]
    return nn.Sequential(*layers[:-1])


def derivative_network(
    box: Sequence[tuple[float, float]], hidden: Sequence[int], second: Sequence[tuple[int, int]]
) -> Callable[[Shape], WithDerivatives]:
    """A `network` with the derivatives that a task's conditions need.

    Args:
        box: As in `network`.
        hidden: As in `network`.
        second: Pairs of inputs for second derivatives; none for first derivatives alone.

    Returns:
        A function from the shape of the data to the model.
    """

    def build(_shape: Shape) -> WithDerivatives:
        net = network(box, hidden)
        return WithDerivatives(net, len(box), second=second) if second else WithDerivatives(net, len(box), order=1)

    return build


def value(u: Jet, data: Tensor, _unknown: Tensor) -> Tensor:
    """Residual of a given value."""
    return u.value[:, 0] - data


def equation_task(
    name: str,
    description: str,
    load: Callable[[int], Splits],
    model: Callable[[Shape], nn.Module],
    loss: Conditions,
    *,
    metrics: tuple[Metric, ...] = (RELATIVE_ERROR,),
    epochs: int = 300,
    sven: Mapping[str, object] = CONTROLLED,
) -> Task:
    """A task whose batch is all of its conditions.

    Args:
        name: Name on the command line.
        description: One line for people.
        load: Splits for a data seed.
        model: New model, whose output has the derivatives that the loss needs.
        loss: The conditions.
        metrics: Numbers reported beside the loss.
        epochs: Steps when no budget is given.
        sven: Options of Sven.

    Returns:
        The task.
    """
    return Task(
        name=name,
        description=description,
        kind="regression",
        load=load,
        model=model,
        loss=loss,
        metrics=metrics,
        batch_size=loss.num_points,
        epochs=epochs,
        schedule="auto",
        options={"sven": sven, "adam": {"lr": 3e-3}, "sgd": {"lr": 1e-4}, "lbfgs": {"lr": 0.1}},
        options_source="not tuned: usual learning rates, and of Sven steps that are tried out unless data are noisy",
    )
