"""A step of Sven on several processes: one system of all their conditions, one solution for all."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from steepest.distributed.agreement import check_alike, fail_together, tell
from steepest.distributed.jacobian import SpreadJacobian
from steepest.distributed.ranks import Ranks
from steepest.distributed.records import Layout, align, layout
from steepest.engine import Jacobian, Rows
from steepest.errors import InvalidOptionError
from steepest.optim.gram import Solution
from steepest.optim.rows import RowKind, check_weights

__all__ = ["Conditions", "decide", "fingerprints", "share", "solver_name"]

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
) -> tuple[Jacobian, Tensor, Tensor, list[tuple[int, int]]]:
    """Compute this rank's conditions and join those of all: rank 0's rows first, each rank's blocks in their order.

    Args:
        ranks: The ranks.
        compute: Runs the closure.
        kind: What it returns.
        settings: What must be the same on all ranks.
        prints: Gives `fingerprints` where the parameters are to be compared.
        weights: Of named blocks, each of which some rank must have.

    Returns:
        The Jacobian of all rows, all rows, the mean loss of all samples, summed over blocks, and the numbers of samples
        and rows of each.

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
    samples = [pair for one in told for pair in one.samples]
    return SpreadJacobian(local, ranks, [one.rows for one in told]), rows, loss, samples


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


def fingerprints(model: nn.Module, trained: Mapping[str, Tensor]) -> dict[str, object]:
    """What tells models apart whose parameters are not equal to the bit, frozen ones included.

    Args:
        model: The model.
        trained: Its trained parameters by name.

    Returns:
        For each parameter its shape, dtype, whether it is trained, and a sum of its bits weighted by their places.
    """
    params = dict(model.named_parameters())
    if not params:
        return {}
    sums = torch.stack([_bits(param.detach()).cpu() for param in params.values()]).tolist()
    return {
        name: (tuple(param.shape), str(param.dtype), name in trained, number)
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
                "would not train one model. Nothing was changed. Remedy: make the model with the same seed on every "
                "process, or load one state_dict into it, before the first step."
            )


def decide(ranks: Ranks, jacobian: Jacobian, solve: Callable[[], tuple[Solution, float]]) -> tuple[Solution, float]:
    """Solve on every rank, since forming the system takes all of them, and use what rank 0 found.

    Args:
        ranks: The ranks.
        jacobian: Of all rows.
        solve: Gives the solution and the factor of the norm guard.

    Returns:
        Both, the same on all ranks to the bit.
    """
    failure: Exception | None = None
    mine: Solution | None = None
    told = torch.zeros(11, dtype=torch.float64, device=jacobian.device)
    try:
        mine, scale = solve()
        length = -1 if mine.spectrum is None else len(mine.spectrum)
        learnt = -1 if mine.memory is None else len(mine.memory)
        damping = float("nan") if mine.damping is None else mine.damping
        numbers = (
            1.0, mine.rank, mine.noise_floor, mine.norm, mine.magnitude, scale, length, mine.weights is None, mine.step,
            damping, learnt,
        )  # fmt: skip
        told = torch.tensor([float(n) for n in numbers], dtype=torch.float64, device=jacobian.device)
    except Exception as error:
        failure = error
    ranks.broadcast_([told], source=0)
    solved, rank, noise_floor, norm, magnitude, factor, length, explicit, step, damping, learnt = told.tolist()
    if not solved:
        fail_together(ranks, failure)
    source = mine if ranks.rank == 0 else None
    options: dict[str, Any] = {"step": step, "damping": None if math.isnan(damping) else damping}
    if explicit:
        options["explicit"] = _explicit(jacobian, source)
        ranks.broadcast_(list(options["explicit"].values()), source=0)
    else:
        options["weights"] = _vector(jacobian.num_rows, jacobian, source.weights if source else None)
        ranks.broadcast_([options["weights"]], source=0)
    spectrum = None
    if length >= 0:
        spectrum = _vector(int(length), jacobian, source.spectrum if source else None)
        ranks.broadcast_([spectrum], source=0)
    if learnt >= 0:
        options["memory"] = _vector(int(learnt), jacobian, source.memory if source else None)
        ranks.broadcast_([options["memory"]], source=0)
    return Solution(jacobian, int(rank), spectrum, noise_floor, norm, magnitude, **options), factor


def _vector(length: int, jacobian: Jacobian, value: Tensor | None) -> Tensor:
    """Rank 0's numbers in float64, or room for them."""
    if value is not None:
        return value.double()
    return torch.empty(length, dtype=torch.float64, device=jacobian.device)


def _explicit(jacobian: Jacobian, solution: Solution | None) -> dict[str, Tensor]:
    if solution is not None:
        return solution.direction()
    return {
        name: torch.empty(shape, dtype=jacobian.dtype, device=jacobian.device)
        for name, shape in jacobian.shapes.items()
    }
