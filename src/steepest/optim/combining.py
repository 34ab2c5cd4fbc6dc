"""What a step is made from: the sums of this process, or those of all ranks, as if one had seen every sample."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steepest.errors import CaptureError
from steepest.optim.blocks import Block
from steepest.optim.crew import Crew
from steepest.optim.curvature import Gathered
from steepest.optim.gathering import Gathering
from steepest.optim.triangles import pack, packed_size, unpack

__all__ = ["Local", "Sums", "combine", "counts", "exchange_like", "sides"]


@dataclass(frozen=True, eq=False)
class Sums:
    """What a step is made from, equal on all ranks.

    Args:
        parts: Sums over samples by the name of a layer's weight, where its factors are updated.
        grad_scale: What turns the sums of gradients into means over samples.
        missing: Layers whose decomposition is not where it should be.
        extras: A matrix for every layer where a subclass of KFAC adds one, by the name of its weight.
    """

    parts: Mapping[str, Gathered]
    grad_scale: float
    missing: frozenset[str] = frozenset()
    extras: Mapping[str, Tensor | None] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Local:
    """What one process knows of its own gradients.

    Args:
        scale: What its gradients in ``p.grad`` are multiplied with; None if its GradScaler skips the step.
        captured: What the captured ones are multiplied with.
        grad_scale: What turns its sums of gradients into means over its samples.
        size: Not finite where anything is not.
        period: Updates of the factors between two decompositions.
    """

    scale: float | None
    captured: float = 1.0
    grad_scale: float = 1.0
    size: Tensor | None = None
    period: int = 1


def sides(block: Block) -> tuple[int, int]:
    """Outputs n and inputs m of a layer, the bias counted as an input."""
    if block.is_table:
        return block.weight.shape[1], block.weight.shape[0]
    return block.weight.shape[0], block.weight[0].numel() + len(block.params) - 1


def exchange_like(block: Block) -> dict[str, Any]:
    """Type and device of a layer's matrices in exchanges, whatever autocast made of them on one rank."""
    return {"dtype": torch.promote_types(block.weight.dtype, torch.float32), "device": block.weight.device}


def counts(
    blocks: Mapping[str, Block], params: Sequence[Tensor], gathering: Gathering, local: Local, missing: Sequence[str]
) -> dict[str, list[float]]:
    """What this rank contributes to `Crew.tally`, in lists as long on every rank.

    Args:
        blocks: All layers, by the name of their weight.
        params: All trained parameters.
        gathering: What was gathered here.
        local: The rest of what is known here.
        missing: Layers of which this rank should have a decomposition and has none.

    Returns:
        The lists by name.
    """
    parts = [gathering.parts.get(name, Gathered()) for name in blocks]
    return {
        "skipped": [float(local.scale is None)],
        "terms": [float(gathering.terms)],
        "grads": [float(p.grad is not None) for p in params],
        "parts": [float(part.input is not None) for part in parts],
        "positions": [float(part.positions) for part in parts],
        "moments": [float(part.moment is not None) for part in parts],
        "missing": [float(name in missing) for name in blocks],
    }


def combine(
    crew: Crew,
    blocks: Mapping[str, Block],
    params: Sequence[Tensor],
    gathering: Gathering,
    local: Local,
    totals: Mapping[str, Sequence[float]],
    extras: Mapping[str, Tensor | None],
) -> Sums:
    r"""Exchange gradients and factors between ranks, in as few messages as possible.

    With :math:`t_r` terms of the loss on rank r, and its own mean :math:`S_r` over its samples,
    :math:`S = \sum_r t_r S_r / \sum_r t_r`; A likewise with its positions. Gradients are plain means over ranks.

    Args:
        crew: The ranks.
        blocks: All layers, by the name of their weight.
        params: All trained parameters; their gradients become the means over ranks, unless DDP has done it.
        gathering: What was gathered here.
        local: The rest of what is known here.
        totals: Sums of all ranks' `counts`, found by `Crew.tally`.
        extras: This rank's matrices of a subclass for layers that have a gradient, None for zeros.

    Returns:
        The sums.

    Raises:
        RuntimeError: For a process alone.
    """
    ranks = crew.ranks
    if ranks is None or local.scale is None:
        raise RuntimeError("a process alone has nothing to combine")
    means = _gradients(crew, params, totals["grads"], local.scale)
    shared = {name: _extra(blocks[name], matrix, local.captured * ranks.size) for name, matrix in extras.items()}
    weight = local.grad_scale * gathering.terms
    packed = {
        name: _packed(block, gathering.parts.get(name), weight, moment=moment > 0)
        for (name, block), part, moment in zip(blocks.items(), totals["parts"], totals["moments"], strict=True)
        if part
    }
    ranks.sum_([*(mean for _, mean in means), *shared.values(), *(t for three in packed.values() for t in three)])
    for param, mean in means:
        whole = mean if local.scale == 1 else mean * local.scale
        if param.grad is None:
            param.grad = whole
        else:
            param.grad.copy_(whole)
    positions = dict(zip(blocks, totals["positions"], strict=True))
    return Sums(
        {name: _unpacked(blocks[name], three, positions[name]) for name, three in packed.items()},
        1 / max(totals["terms"][0], 1),
        frozenset(name for name, count in zip(blocks, totals["missing"], strict=True) if count),
        shared,
    )


def _gradients(
    crew: Crew, params: Sequence[Tensor], having: Sequence[float], scale: float
) -> list[tuple[Tensor, Tensor]]:
    """Parameters with this rank's share of their mean gradient, where some rank has one."""
    size = crew.place[1]
    if not crew.averaged:
        return [
            (p, torch.zeros_like(p) if p.grad is None else p.grad / (scale * size))
            for p, count in zip(params, having, strict=True)
            if count
        ]
    if any(count not in {0, size} for count in having):
        raise CaptureError(
            "Some parameters have a gradient on some ranks only, and the model is in DistributedDataParallel, which "
            "gives all ranks the same: make the last backward before step() one outside of no_sync()."
        )
    return []


def _extra(block: Block, matrix: Tensor | None, divisor: float) -> Tensor:
    # In the same layout on every rank: products of matrices in different layouts are rounded differently.
    like = exchange_like(block)
    return torch.zeros(sides(block), **like) if matrix is None else (matrix.to(**like) / divisor).contiguous()


def _packed(block: Block, part: Gathered | None, weight: float, *, moment: bool) -> list[Tensor]:
    """What a layer's factors are on their way: two triangles, and the moment where there is one."""
    (n, m), like = sides(block), exchange_like(block)
    if part is None or part.input is None or part.grad is None:
        shapes: list[tuple[int, ...]] = [(m if block.is_table else packed_size(m),), (packed_size(n),)]
        return [torch.zeros(shape, **like) for shape in (*shapes, *([(n, m)] if moment else []))]
    found = [part.input if block.is_table else pack(part.input), pack(part.grad) * weight]
    if moment:
        found.append(torch.zeros(n, m, **like) if part.moment is None else part.moment * weight)
    return [tensor.to(**like).contiguous() for tensor in found]


def _unpacked(block: Block, tensors: Sequence[Tensor], positions: float) -> Gathered:
    n, m = sides(block)
    whole = Gathered()
    whole.positions = int(positions)
    whole.input, whole.grad = tensors[0] if block.is_table else unpack(tensors[0], m), unpack(tensors[1], n)
    whole.moment = tensors[2] if len(tensors) > 2 else None
    return whole
