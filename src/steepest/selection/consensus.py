"""What the samples of a class agree on: the mean of their unit gradients, and its direction in a sketch."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from steepest.engine import Jacobian
from steepest.engine.records import column_chunks
from steepest.errors import NonFiniteError, UnsupportedModelError
from steepest.linalg import FrequentDirections
from steepest.selection.joining import add_counts, add_sums
from steepest.selection.method import Rows
from steepest.selection.together import Together

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
    def sketch_and_add(self, rows: Rows, groups: Tensor, sketch: FrequentDirections) -> None:
        """Feed a batch to a sketch and take it up; a zero gradient adds nothing.

        Args:
            rows: The batch.
            groups: ``[B]``, the group of every sample.
            sketch: Fed first, since it refuses what is not finite.
        """
        layer = _single_layer(rows)
        if layer is None:
            rows.jacobian.sketch_into(_Passing(sketch, self, groups))
            return
        rows.jacobian.sketch_into(sketch)
        factors = _inverse(rows.jacobian.squared_norms())
        d_in = rows.jacobian.shapes[rows.last][1]
        for group, places in by_group(groups):
            # Every sample enters one product of its own group: all groups together cost what one product of all would.
            # In float64 neither autocast nor TF32 rounds it.
            places = places.to(factors.device)
            inputs, grads = (part[places].double() for part in layer)
            product = (grads * factors[places].view(-1, 1, 1)).flatten(0, 1).T @ inputs.flatten(0, 1)
            parts = {n: product[:, :d_in] if n == rows.last else product[:, d_in:] for n in rows.jacobian.names}
            self._take(group, len(places), parts)

    def add(self, blocks: Mapping[str, Tensor], groups: Tensor) -> None:
        """Take explicit gradients.

        Args:
            blocks: ``[n, numel]`` for each parameter.
            groups: ``[n]``, the group of every sample.
        """
        norms = [torch.linalg.vector_norm(block, dim=1, dtype=torch.float64) for block in blocks.values()]
        factors = _inverse(torch.stack(norms).square().sum(0))
        doubles = {name: block.double() for name, block in blocks.items()}
        for group, places in by_group(groups):
            places = places.to(factors.device)
            self._take(group, len(places), {name: factors[places] @ block[places] for name, block in doubles.items()})

    def _take(self, group: int, count: int, parts: Mapping[str, Tensor]) -> None:
        self._counts[group] = self._counts.get(group, 0) + count
        sums = self._sums.setdefault(group, {})
        for name, part in parts.items():
            flat = part.reshape(-1)
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

    def join(self, together: Together) -> None:
        """Add up the sums of all processes on the first one; the others have none afterwards.

        Args:
            together: The processes.
        """
        held = next((part.device for parts in self._sums.values() for part in parts.values()), None)
        self._counts = add_counts(self._counts, together)
        self._sums = add_sums(self._sums, together, held)

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


class _Passing:
    """Hands explicit gradients on to a sketch and adds them up on the way: they are made once."""

    def __init__(self, sketch: FrequentDirections, means: ClassMeans, groups: Tensor) -> None:
        self.sketch_size = sketch.sketch_size
        self._sketch, self._means, self._groups = sketch, means, groups

    def insert(self, blocks: Mapping[str, Tensor], /) -> None:
        self._sketch.insert(blocks)
        count = len(next(iter(blocks.values())))
        mine, self._groups = self._groups[:count], self._groups[count:]
        self._means.add(blocks, mine)


def _inverse(squares: Tensor) -> Tensor:
    """``1 / sqrt``, 0 where there is nothing to divide."""
    return torch.where(squares > 0, squares.rsqrt(), 0)


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
