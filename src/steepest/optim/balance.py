"""A geometry in which every layer counts alike: each is measured by the mean size of its own gradients."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steepest._validation import check_real
from steepest.distributed.jacobian import SpreadJacobian
from steepest.distributed.ranks import Ranks
from steepest.engine import Jacobian
from steepest.engine.records import MaterializedRecord, Record
from steepest.optim.gram import Solution

__all__ = ["BalancedGeometry", "BalancedMetric"]


@dataclass(frozen=True)
class BalancedMetric:
    r"""Steps that are measured layer by layer, each layer by the size of its own gradients.

    .. math:: d = \arg\min_d \; \|J d - R\|^2 + \lambda \sum_l m_l\, |d_l|^2, \qquad
        m_l = \frac{n_l + \epsilon\, \bar n}{\bar n}, \qquad n_l = \operatorname{mean}_n |J_{n l}|^2

    with running means over the batches and the mean n-bar over the layers that have gradients. In the Euclidean norm
    nearly all of a step goes where gradients are large, which is where inputs are wide (784 pixels before 32 hidden
    units): here the layers share it. It costs one number a layer, no factorisation and no products beside those of the
    step.

    A layer is a module with its own parameters, weight and bias together, of any kind that the engine knows.

    Args:
        decay: Share of the past in the running means.
        damping: epsilon: 0 balances in full, a large one gives the Euclidean norm.

    Raises:
        InvalidOptionError: If an option is impossible.

    References:
        The damped conditions of Sven, arXiv 2604.01279, in a norm of layers as in the modular norm, arXiv 2405.14813,
        with measured sizes in place of derived ones.

    Example:
        >>> import steepest as st
        >>> st.BalancedMetric()
        BalancedMetric(decay=0.98, damping=0.001)
    """

    decay: float = 0.98
    damping: float = 1e-3

    def __post_init__(self) -> None:
        check_real("decay", self.decay, low=0, high=1, open_high=True)
        check_real("damping", self.damping, low=0)

    def geometry(
        self, before: Mapping[str, Mapping[str, Any]], jacobian: Jacobian, ranks: Ranks | None
    ) -> "BalancedGeometry":
        """Let a batch change the metric, and bring its conditions to the new coordinates.

        Several processes sum the squares of their rows, a number a layer.

        Args:
            before: What was kept of every layer, by the name of its first parameter.
            jacobian: Of the batch.
            ranks: The processes that share it.

        Returns:
            The conditions in the new coordinates.
        """
        local = jacobian.local if isinstance(jacobian, SpreadJacobian) else jacobian
        layers = _layers(local.records)
        totals = torch.stack([record.squared_norms(local.max_memory).sum() for record in layers.values()])
        if ranks is not None:
            ranks.sum_([totals])
        means = totals / max(1, jacobian.num_rows)
        states = {name: self._blended(before.get(name, {}), mean) for name, mean in zip(layers, means, strict=True)}
        sizes = torch.stack([state["mean_square"] for state in states.values()])
        middle = sizes.sum() / (sizes > 0).sum().clamp(min=1)  # a layer that nothing reaches has no size
        metric = torch.where(middle > 0, sizes / middle + self.damping, torch.ones_like(sizes))
        roots = torch.where(metric > 0, metric, torch.ones_like(metric)).rsqrt().tolist()
        scales = dict(zip(layers, roots, strict=True))
        if isinstance(jacobian, SpreadJacobian):
            return BalancedGeometry(jacobian.mapped(lambda rows: _scaled(rows, layers, scales)), scales, states)
        return BalancedGeometry(_scaled(jacobian, layers, scales), scales, states)

    def _blended(self, before: Mapping[str, Any], mean: Tensor) -> dict[str, Tensor]:
        last = before.get("mean_square")  # of another metric there is none: it begins anew
        return {"mean_square": mean if last is None else last.lerp(mean, 1 - self.decay)}


@dataclass(frozen=True, eq=False)
class BalancedGeometry:
    """The conditions of one batch in coordinates in which all layers are of one size.

    Args:
        jacobian: In these coordinates.
        scales: What every layer was multiplied with, by the name of its first parameter.
        states: What is kept of every layer.
    """

    jacobian: Jacobian
    scales: dict[str, float]
    states: dict[str, dict[str, Tensor]]

    def direction(self, solution: Solution) -> dict[str, Tensor]:
        """A solution in these coordinates, as a direction of the parameters."""
        found = solution.direction()
        owners = {_owner(first): scale for first, scale in self.scales.items()}
        return {name: part * owners.get(_owner(name), 1.0) for name, part in found.items()}


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _layers(records: Iterable[Record]) -> dict[str, Record]:
    """The records, explicit gradients of several modules apart, by the name of their first parameter."""
    found: dict[str, Record] = {}
    for record in records:
        owners = {_owner(name) for name in record.names}
        if len(owners) == 1:
            found[record.names[0]] = record
            continue
        grads = record.per_sample_grads()
        for owner in sorted(owners):
            own = {name: grad for name, grad in grads.items() if _owner(name) == owner}
            found[next(iter(own))] = MaterializedRecord(own)
    return found


def _scaled(jacobian: Jacobian, layers: Mapping[str, Record], scales: Mapping[str, float]) -> Jacobian:
    """The rows of these layers, each multiplied with its scale."""
    records = [record.scaled(scales[name]) for name, record in layers.items()]
    shapes = jacobian.shapes
    return Jacobian(records, shapes, jacobian.num_rows, jacobian.max_memory, jacobian.device, jacobian.dtype)
