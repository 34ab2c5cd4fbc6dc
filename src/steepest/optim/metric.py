"""In which geometry a step is the shortest: the curvature of past batches, a Kronecker product for every layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steepest._validation import check_integer, check_real
from steepest.distributed.jacobian import SpreadJacobian
from steepest.distributed.ranks import Ranks
from steepest.engine import Jacobian
from steepest.engine.records import Record
from steepest.linalg.factors import eigenbasis, product, symmetrised
from steepest.optim.curvature import Curvature
from steepest.optim.gram import Solution

__all__ = ["Geometry", "KroneckerMetric", "LayerMetric", "unwhiten", "whiten"]

# Sums of ``x x^T`` and ``g g^T`` over a batch, by the name of a layer's weight, with their numbers.
Sums = dict[str, tuple[Tensor, Tensor, float, float]]


@dataclass(frozen=True)
class KroneckerMetric:
    r"""Steps that are the shortest in the curvature of past batches, instead of in the Euclidean norm.

    .. math:: d = \arg\min_d \; \|J d - R\|^2 + \lambda\, d^T M d, \qquad
        M = \Big(\tfrac{A}{\operatorname{mean}} + \epsilon I\Big)^{\rho} \otimes
            \Big(\tfrac{S}{\operatorname{mean}} + \epsilon I\Big)^{\rho} \text{ for every layer}

    with A and S the running means of ``x x^T`` (a 1 joined for the bias) and ``g g^T`` over inputs and row gradients
    of a layer, each divided by its mean eigenvalue. One batch has few conditions and leaves most directions open: the
    minimum-norm solution fills them by the Euclidean norm, this one by what earlier batches said of them. It costs
    products of a layer's inputs and gradients with roots of both factors, and two Cholesky factorisations a layer every
    now and then.

    Linear layers and convolutions without groups have a metric; other parameters keep the Euclidean one, and so do all
    parameters of a `ReferenceCapture`, which knows gradients and not what they are products of.

    Args:
        decay: Share of the past in the running factors.
        damping: epsilon: 0 gives the bare curvature, a large one the Euclidean norm.
        power: rho: 1 is the curvature, 1/2 its root.
        every: Steps between two factorisations; the first ones are renewed sooner.
        max_size: Layers with more inputs or outputs than this keep the Euclidean norm: a factor has the square of that
            many numbers, a factorisation the cube of operations, and directions in which wide inputs hardly vary, such
            as pixels at the edge of a picture, are better left alone.

    Raises:
        InvalidOptionError: If an option is impossible.

    References:
        Factors as in K-FAC, arXiv 1503.05671; the damped conditions of Sven, arXiv 2604.01279, in their norm.

    Example:
        >>> import steepest as st
        >>> st.KroneckerMetric(every=20)
        KroneckerMetric(decay=0.99, damping=0.3, power=1.0, every=20, max_size=512)
    """

    decay: float = 0.99
    damping: float = 0.3
    power: float = 1.0
    every: int = 10
    max_size: int = 512

    def __post_init__(self) -> None:
        check_real("decay", self.decay, low=0, high=1, open_high=True)
        check_real("damping", self.damping, low=0, open_low=True)
        check_real("power", self.power, low=0)
        check_integer("every", self.every, low=1)
        check_integer("max_size", self.max_size, low=1)

    def geometry(self, before: Mapping[str, Mapping[str, Any]], jacobian: Jacobian, ranks: Ranks | None) -> "Geometry":
        """Let a batch change the metric, and bring its conditions to the new coordinates.

        Several processes sum what their rows say of every layer.

        Args:
            before: What was kept of every layer, by the name of its weight; what another metric kept is left alone.
            jacobian: Of the batch.
            ranks: The processes that share it.

        Returns:
            The conditions in the new coordinates; the metric before stays as it is.
        """
        kept = {name: LayerMetric(**state) for name, state in before.items() if "input_root" in state}
        return _geometry_of(self, kept, jacobian, ranks)

    def root(self, factor: Tensor, name: str) -> Tensor:
        """A matrix Q with ``Q Q^T = (factor / mean + epsilon I)^(-rho)``; a factor that is zero counts as 0.

        Args:
            factor: ``[k, k]``.
            name: What to call it in a message.

        Returns:
            ``[k, k]``: triangular where rho is 1, which costs a fraction of the eigenvectors, else symmetric.
        """
        matrix = symmetrised(factor, name)
        mean = matrix.diagonal().mean()
        matrix = matrix / torch.where(mean > 0, mean, torch.ones_like(mean))
        if self.power == 1:
            matrix.diagonal().add_(self.damping)
            lower, failed = torch.linalg.cholesky_ex(matrix)
            if not failed:
                unit = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
                inverse: Tensor = torch.linalg.solve_triangular(lower, unit, upper=False)
                return inverse.mT.contiguous()
            matrix.diagonal().sub_(self.damping)
        values, vectors = eigenbasis(matrix, name)
        return product(vectors * (values + self.damping) ** (-self.power / 2), vectors.mT)


@dataclass(frozen=True, eq=False)
class LayerMetric:
    """The metric of one layer. It is never changed: an update makes a new one, which a step keeps or drops.

    Args:
        input_factor: Running mean of ``x x^T``.
        grad_factor: Running mean of ``g g^T``.
        input_root: Q of the side of the inputs, of some steps ago: ``Q Q^T`` is the metric's inverse there.
        grad_root: Q of the side of the outputs.
        age: Steps since the roots were made.
        updates: Steps so far.
    """

    input_factor: Tensor
    grad_factor: Tensor
    input_root: Tensor
    grad_root: Tensor
    age: int
    updates: int

    def state(self) -> dict[str, Tensor | int]:
        """What a state_dict keeps."""
        return dict(vars(self))


def _layer_sums(jacobian: Jacobian, max_size: int) -> Sums:
    """What the rows of one batch say of every layer that has a metric.

    Args:
        jacobian: Their Jacobian.
        max_size: Largest side of a factor.

    Returns:
        The sums, by the name of the layer's weight.
    """
    found: Sums = {}
    for record in jacobian.records:
        shape = record.shapes[record.names[0]]
        if max(shape[:1].numel(), shape[1:].numel()) > max_size:
            continue
        factors = record.kronecker_factors("expand")
        # Of an embedding the factor is a diagonal: its weight is the transpose of a linear layer's.
        if factors is not None and factors.positions and factors.input_factor.ndim == 2:
            positions, rows = float(factors.positions), float(record.num_rows)
            sums = factors.input_factor * positions, factors.grad_factor * rows
            found[record.names[0]] = (*sums, positions, rows)
    return found


def _blend(metric: KroneckerMetric, before: Mapping[str, LayerMetric], sums: Sums) -> dict[str, LayerMetric]:
    """Blend the sums of one batch in, and renew the roots when it is time.

    Args:
        metric: The settings.
        before: The metric of every layer so far.
        sums: What the batch said.

    Returns:
        The metric of every layer; those that the batch did not use are as they were.
    """
    return {**before, **{name: _blended(metric, name, before.get(name), new) for name, new in sums.items()}}


def _blended(
    metric: KroneckerMetric, name: str, before: LayerMetric | None, sums: tuple[Tensor, Tensor, float, float]
) -> LayerMetric:
    inputs, grads = sums[0] / sums[2], sums[1] / sums[3]
    age, updates = 1, 1
    if before is not None:
        inputs = before.input_factor.lerp(inputs, 1 - metric.decay)
        grads = before.grad_factor.lerp(grads, 1 - metric.decay)
        age, updates = before.age + 1, before.updates + 1
        if not Curvature.is_stale(age, updates, metric.every):
            return LayerMetric(inputs, grads, before.input_root, before.grad_root, age, updates)
    roots = metric.root(inputs, f"input factor of {name}"), metric.root(grads, f"gradient factor of {name}")
    return LayerMetric(inputs, grads, *roots, 0, updates)


def whiten(jacobian: Jacobian, layers: Mapping[str, LayerMetric]) -> Jacobian:
    """Change coordinates so that the Euclidean norm is the metric: ``J M^(-1/2)``.

    Args:
        jacobian: J.
        layers: The metric of every layer, by the name of its weight.

    Returns:
        The Jacobian in the new coordinates, where weight and bias of a layer are one matrix named as the weight.
    """
    records = []
    for record in jacobian.records:
        layer = _of(record, layers)
        records.append(record if layer is None else record.whitened(layer.input_root, layer.grad_root))
    used = {name for record in jacobian.records for name in record.names}
    shapes = {name: shape for record in records for name, shape in record.shapes.items()}
    shapes.update((name, shape) for name, shape in jacobian.shapes.items() if name not in used)
    return Jacobian(records, shapes, jacobian.num_rows, jacobian.max_memory, jacobian.device, jacobian.dtype)


def _of(record: Record, layers: Mapping[str, LayerMetric]) -> LayerMetric | None:
    """The metric of a record, unless a layer was used without its bias this time."""
    layer = layers.get(record.names[0])
    if layer is None:
        return None
    features = record.shapes[record.names[0]][1:].numel() + len(record.names) - 1
    return layer if len(layer.input_root) == features else None


def unwhiten(
    direction: Mapping[str, Tensor], jacobian: Jacobian, layers: Mapping[str, LayerMetric]
) -> dict[str, Tensor]:
    """Bring a direction back to the parameters' own coordinates: ``M^(-1/2) d``.

    Args:
        direction: By the names of the whitened Jacobian.
        jacobian: The one before whitening.
        layers: The metric of every layer.

    Returns:
        The direction for every parameter of the Jacobian.
    """
    found = dict(direction)
    for record in jacobian.records:
        layer = _of(record, layers)
        if layer is None:
            continue
        weight, *bias = record.names
        matrix = direction[weight]
        matrix = product(layer.grad_root.to(matrix), matrix.flatten(1), layer.input_root.to(matrix).mT)
        shape = record.shapes[weight]
        found[weight] = matrix[:, : shape[1:].numel()].reshape(shape)
        if bias:
            found[bias[0]] = matrix[:, -1]
    return found


@dataclass(frozen=True, eq=False)
class Geometry:
    """The conditions of one batch in the coordinates of its metric.

    Args:
        jacobian: In these coordinates.
        plain: This process's rows in the parameters' own.
        layers: The metric of every layer, by the name of its weight.
    """

    jacobian: Jacobian
    plain: Jacobian
    layers: dict[str, LayerMetric]

    @property
    def states(self) -> dict[str, dict[str, Tensor | int]]:
        """What is kept of every layer."""
        return {name: layer.state() for name, layer in self.layers.items()}

    def direction(self, solution: Solution) -> dict[str, Tensor]:
        """A solution in these coordinates, as a direction of the parameters."""
        return unwhiten(solution.direction(), self.plain, self.layers)


def _geometry_of(
    metric: KroneckerMetric, before: Mapping[str, LayerMetric], jacobian: Jacobian, ranks: Ranks | None
) -> Geometry:
    local = jacobian.local if isinstance(jacobian, SpreadJacobian) else jacobian
    sums = _layer_sums(local, metric.max_size)
    if ranks is not None:
        counts = torch.tensor([s[2:] for s in sums.values()], dtype=torch.float64, device=jacobian.device)
        ranks.sum_([tensor for total in sums.values() for tensor in total[:2]] + [counts])
        sums = {name: (*total[:2], *count) for (name, total), count in zip(sums.items(), counts.tolist(), strict=True)}
    layers = _blend(metric, before, sums)
    if isinstance(jacobian, SpreadJacobian):
        return Geometry(jacobian.mapped(lambda rows: whiten(rows, layers)), local, layers)
    return Geometry(whiten(jacobian, layers), local, layers)
