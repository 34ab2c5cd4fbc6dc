"""A step of Sven on several processes: one system of all their conditions."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from steepest.distributed.agreement import check_alike, tell
from steepest.distributed.jacobian import SpreadJacobian
from steepest.distributed.ranks import Ranks
from steepest.distributed.records import Layout, align, layout
from steepest.engine import Jacobian, Rows
from steepest.errors import InvalidOptionError
from steepest.optim.rows import RowKind, check_weights

__all__ = ["Conditions", "Shared", "fingerprints", "share", "solver_name"]

ALIKE = "build the optimizer with the same arguments, schedule and loaded state on every process"


@dataclasses.dataclass(frozen=True, eq=False)
class Conditions:
    """What one call of the closure gave.

    Args:
        output: What it returned.
        jacobian: Jacobian of its rows.
        rhs: ``[R]``, the rows.
        samples: Number of samples and rows of each, block by block.
    """

    output: Rows
    jacobian: Jacobian
    rhs: Tensor
    samples: list[tuple[int, int]]


@dataclasses.dataclass(frozen=True, eq=False)
class Shared:
    """The conditions of a whole batch.

    Args:
        jacobian: Of all rows.
        rhs: ``[R]``, all rows.
        loss: Mean loss of all samples, summed over blocks.
        samples: Number of samples and rows of each, block by block; a rank's blocks follow those of the one before.
        totals: How many samples there are, on all ranks, in the blocks of that name, for each of these blocks.
    """

    jacobian: Jacobian
    rhs: Tensor
    loss: Tensor
    samples: list[tuple[int, int]]
    totals: list[int]


@dataclasses.dataclass(frozen=True)
class _Report:
    """What a rank tells the others of its batch: all of it small."""

    settings: dict[str, object]
    prints: dict[str, object] | None
    blocks: dict[str | None, tuple[float, int]]  # sum of losses and their number
    rows: int
    samples: list[tuple[int, int]]
    layout: Layout


def share(
    ranks: Ranks,
    compute: Callable[[], Conditions],
    kind: RowKind,
    settings: Mapping[str, object],
    prints: Callable[[], dict[str, object]] | None,
    weights: Mapping[str, float],
) -> Shared:
    """Compute this rank's conditions and join those of all: rank 0's rows first, each rank's blocks in their order.

    Args:
        ranks: The ranks.
        compute: Runs the closure.
        kind: What it returns.
        settings: What must be the same on all ranks.
        prints: Gives `fingerprints` where the parameters are to be compared.
        weights: Of named blocks, each of which some rank must have.

    Returns:
        The conditions of all ranks.

    Raises:
        InvalidOptionError: If settings or parameters differ between ranks.
    """
    found: Conditions | None = None
    report: _Report | None = None
    failure: Exception | None = None
    try:
        found = compute()
        report = _report(found, kind, settings, prints)
    except Exception as error:
        failure = error
    told = tell(ranks, report, failure)
    check_alike("Sven", [one.settings for one in told], ALIKE)
    if all(one.prints is not None for one in told):
        _check_start([one.prints or {} for one in told])
    check_weights(weights, [name for one in told for name in one.blocks])
    found = cast("Conditions", found)  # else told above
    local = found.jacobian
    if len({one.layout for one in told}) > 1:
        try:
            local = align(local, [one.layout for one in told])
        except Exception as error:
            failure = error
        tell(ranks, None, failure)
    rows = torch.cat(ranks.gather(found.rhs))
    loss = torch.tensor(_mean([one.blocks for one in told]), dtype=rows.dtype, device=rows.device)
    named = [(name, pair) for one in told for name, pair in zip(one.blocks, one.samples, strict=True)]
    sizes: dict[str | None, int] = {}
    for name, (count, _) in named:
        sizes[name] = sizes.get(name, 0) + count
    jacobian = SpreadJacobian(local, ranks, [one.rows for one in told])
    return Shared(jacobian, rows, loss, [pair for _, pair in named], [sizes[name] for name, _ in named])


def _report(
    found: Conditions,
    kind: RowKind,
    settings: Mapping[str, object],
    prints: Callable[[], dict[str, object]] | None,
) -> _Report:
    named = isinstance(found.output, Mapping)
    blocks = dict(found.output) if isinstance(found.output, Mapping) else {None: found.output}
    taken = [b.detach().double().square() if kind == "residuals" else b.detach().double() for b in blocks.values()]
    sums = torch.stack([block.sum() for block in taken]).tolist()
    batch = {
        "what the closure returns": "a dict" if named else "a tensor",
        "dtype of the rows": found.rhs.dtype,
        "dtype of the gradients": found.jacobian.dtype,
        "number of parameters": found.jacobian.num_parameters,
    }
    return _Report(
        {**settings, **batch},
        None if prints is None else prints(),
        {name: (total, len(block)) for (name, block), total in zip(blocks.items(), sums, strict=True)},
        found.jacobian.num_rows,
        found.samples,
        layout(found.jacobian),
    )


def _mean(told: list[dict[str | None, tuple[float, int]]]) -> float:
    """Mean over all samples of every block, summed over blocks; some ranks may lack a block."""
    total = 0.0
    for name in dict.fromkeys(name for blocks in told for name in blocks):
        parts = [blocks[name] for blocks in told if name in blocks]
        total += sum(part for part, _ in parts) / sum(count for _, count in parts)
    return total


def solver_name(solver: object) -> str:
    """A solver with its settings; one that is no dataclass may show its address."""
    return repr(solver) if dataclasses.is_dataclass(solver) else type(solver).__name__


def fingerprints(model: nn.Module, groups: Mapping[str, int]) -> dict[str, object]:
    """What tells models apart whose parameters are not equal to the bit, frozen ones included.

    Args:
        model: The model.
        groups: For each parameter that is trained the number of its group.

    Returns:
        For each parameter its shape, dtype, group, and a sum of its bits weighted by their places.
    """
    params = dict(model.named_parameters())
    if not params:
        return {}
    sums = torch.stack([_bits(param.detach()).cpu() for param in params.values()]).tolist()
    return {
        name: (tuple(param.shape), str(param.dtype), groups.get(name), number)
        for (name, param), number in zip(params.items(), sums, strict=True)
    }


def _bits(tensor: Tensor) -> Tensor:
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[min(tensor.itemsize, 8)]
    bits = tensor.contiguous().view(-1).view(whole).long()
    odd = torch.arange(1, 2 * len(bits) + 1, 2, device=bits.device)  # sums of integers do not depend on their order
    return (bits * odd).sum()


def _check_start(told: list[dict[str, object]]) -> None:
    first = told[0]
    for rank, other in enumerate(told):
        names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InvalidOptionError(
                f"Parameter {names[0]!r}{more} is not the same on rank 0 and on rank {rank}, so that the processes "
                "would not train one model. Nothing was changed. Remedy: make the model with the same seed and groups "
                "on every process, or load one state_dict into it, before the first step."
            )
