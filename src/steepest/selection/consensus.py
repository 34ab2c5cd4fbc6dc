"""What the samples of a class agree on: the mean of their unit gradients, and its direction in a sketch."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from steepest.engine import Jacobian
from steepest.engine.records import column_chunks
from steepest.errors import NonFiniteError, UnsupportedModelError
from steepest.selection.method import Rows

__all__ = ["ClassMeans", "by_group", "direction", "unit_rows"]

CHUNK_BYTES = 1 << 24
ROUNDING = 1e-6  # what float32 leaves of a mean of unit vectors that cancel


class ClassMeans:
    """Sums of unit gradients ``g / |g|`` by class, in parameter space: one float64 vector of size D per class."""

    def __init__(self) -> None:
        self._sums: dict[int, dict[str, Tensor]] = {}
        self._counts: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that the sums take."""
        return sum(part.nbytes for sums in self._sums.values() for part in sums.values())

    @torch.no_grad()
    def add(self, rows: Rows, groups: Tensor) -> None:
        """Take a batch; a zero gradient adds nothing.

        Args:
            rows: The batch.
            groups: ``[B]``, the group of every sample.
        """
        squares = rows.jacobian.squared_norms()
        factors = torch.where(squares > 0, squares.rsqrt(), 0)
        for group, places in by_group(groups):
            self._counts[group] = self._counts.get(group, 0) + len(places)
        for group, parts in _sums_by_group(rows, factors, groups):
            sums = self._sums.setdefault(group, {})
            for name, part in parts.items():
                flat = part.reshape(-1).double()
                sums[name] = sums[name].to(flat.device).add_(flat) if name in sums else flat

    def projected(self, sketch: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """Multiply the means by a sketch, in float64 and a few columns at a time.

        Args:
            sketch: ``[l, numel]`` for each parameter.

        Returns:
            ``[l]``, float64 on the CPU, by group.
        """
        found = sorted(self._sums)
        length = len(next(iter(sketch.values())))
        total = torch.zeros(length, len(found), dtype=torch.float64, device="cpu")
        for name, block in sketch.items():
            for columns in column_chunks(block.shape[1], 8 * (length + len(found)), CHUNK_BYTES):
                means = torch.stack([self._sums[g][name][columns] / self._counts[g] for g in found])
                total += (block[:, columns].double() @ means.to(block.device).T).cpu()
        return dict(zip(found, total.T.contiguous(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Copies of the sums, and the counts."""
        sums = {group: {name: part.clone() for name, part in parts.items()} for group, parts in self._sums.items()}
        return {"sums": sums, "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a state, which stays as it is."""
        self._sums = {g: {name: part.clone() for name, part in parts.items()} for g, parts in state["sums"].items()}
        self._counts = dict(state["counts"])


def by_group(groups: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Go through the groups of a batch.

    Args:
        groups: ``[B]``, the group of every sample, on the CPU.

    Yields:
        A group and the ascending positions of its samples, smaller groups first.
    """
    order = torch.argsort(groups, stable=True)
    values, sizes = torch.unique_consecutive(groups[order], return_counts=True)
    yield from zip(values.tolist(), order.split(sizes.tolist()), strict=True)


def direction(vector: Tensor, scale: float = 1.0) -> Tensor:
    """Normalise a vector, or return zeros where it is nothing but rounding.

    Args:
        vector: ``[l]``.
        scale: The norm that the vector could have had.

    Returns:
        A unit vector, or zeros.
    """
    norm = float(vector.norm())
    return vector / norm if norm > ROUNDING * scale else torch.zeros_like(vector)


def unit_rows(jacobian: Jacobian, sketch: Mapping[str, Tensor], indices: Tensor) -> Tensor:
    """Project the gradients of a batch on a sketch and normalise them.

    Args:
        jacobian: Of the batch.
        sketch: ``[l, *shape]`` for each parameter.
        indices: ``[B]``, positions in the data, for messages.

    Returns:
        ``[B, l]``, float64 on the CPU; zeros where the projection is zero.

    Raises:
        NonFiniteError: If a projection is no finite number.
    """
    if not len(next(iter(sketch.values()))):  # every gradient was zero
        return torch.zeros(len(indices), 0, dtype=torch.float64, device="cpu")
    z = jacobian.project(sketch).detach().cpu().double()
    norms = z.norm(dim=1, keepdim=True)
    if not bool(norms.isfinite().all()):
        worst = indices[int((~norms[:, 0].isfinite()).nonzero()[0])]
        raise NonFiniteError(f"The gradient of sample {int(worst)} is no finite number: look at this sample.")
    return torch.where(norms > 0, z / norms, 0)


def _sums_by_group(rows: Rows, factors: Tensor, groups: Tensor) -> Iterator[tuple[int, Mapping[str, Tensor]]]:
    """``sum_i factor_i g_i`` over the samples of each group in the batch."""
    jacobian = rows.jacobian
    layer = _single_layer(rows)
    for group, places in by_group(groups):
        places = places.to(factors.device)
        if layer is None:
            masked = torch.zeros_like(factors).index_copy_(0, places, factors[places])
            yield group, jacobian.vjp(masked)
            continue
        # Every sample enters one product of its own group: all groups together cost what one product of all would.
        # In float64 neither autocast nor TF32 rounds it.
        inputs, grads = (part[places].double() for part in layer)
        product = (grads * factors[places].view(-1, 1, 1)).flatten(0, 1).T @ inputs.flatten(0, 1)
        d_in = jacobian.shapes[rows.last][1]
        yield group, {name: product[:, :d_in] if name == rows.last else product[:, d_in:] for name in jacobian.names}


def _single_layer(rows: Rows) -> tuple[Tensor, Tensor] | None:
    """Inputs and output gradients of the one linear layer that the scope consists of, if it does."""
    shapes = rows.jacobian.shapes
    if len(shapes) > 2 or len(shapes.get(rows.last, ())) != 2:
        return None
    try:
        inputs, grads = rows.jacobian.layer_rows(rows.last)
    except UnsupportedModelError:  # tied with an embedding, say
        return None
    # With the layer's bias trained, a 1 is joined to its inputs; a second parameter from elsewhere has no column.
    return (inputs, grads) if inputs.shape[2] == shapes[rows.last][1] + len(shapes) - 1 else None
