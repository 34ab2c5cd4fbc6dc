"""SAGE on several processes: sketches merged in the order of the ranks, sums added, scores put in the data's order."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from steepest.distributed.agreement import tell
from steepest.linalg import FrequentDirections
from steepest.selection.together import Together

__all__ = ["add_counts", "add_sums", "from_first", "merge_sketches"]


def merge_sketches(sketch: FrequentDirections, together: Together) -> None:
    """Let the first process take the sketches of all others, one after the other; theirs stay as they are.

    Every other process sends at most l rows, 4 l D bytes; the first holds one of them beside its own.

    Args:
        sketch: This process's own; that of the first process has rows.
        together: The processes.
    """
    with together.attempt():
        sketch.compress()
    told = together.told(sketch.summary())
    own, failed = sketch.rows(), None
    for source, summary in enumerate(told):
        if not source or not summary["filled"]:
            continue
        if together.ranks.rank == source:
            together.to_first(list(own.values()), source)
        elif together.leads:
            shapes = {name: (summary["filled"], width) for name, width in summary["columns"].items()}
            room = [block.new_empty(shapes[name]) for name, block in own.items()]
            sent = together.to_first(room, source)
            try:
                there = {name: rows.to(own[name].device) for name, rows in zip(own, sent, strict=True)}
                if failed is None:
                    sketch.absorb(summary, there)
            except Exception as error:  # the others still send
                failed = error
            own = sketch.rows()
    tell(together.ranks, None, failed)


def add_counts(counts: Mapping[int, int], together: Together) -> dict[int, int]:
    """Add up numbers by group.

    Args:
        counts: Of this process.
        together: The processes.

    Returns:
        Of all, in ascending order of group.
    """
    told = together.told(dict(counts))
    return {group: sum(other.get(group, 0) for other in told) for group in sorted(set().union(*told))}


def add_sums(
    sums: dict[int, dict[str, Tensor]], together: Together, device: torch.device | None = None
) -> dict[int, dict[str, Tensor]]:
    """Add up float64 vectors by group and name, one group after the other.

    Args:
        sums: Of this process; emptied on all but the first.
        together: The processes.
        device: Where this process has its vectors, if it has any.

    Returns:
        Of all, on the first process; nothing on the others.
    """
    widths: dict[int, dict[str, int]] = {}
    for other in together.told({g: {name: part.numel() for name, part in parts.items()} for g, parts in sums.items()}):
        widths.update(other)
    total: dict[int, dict[str, Tensor]] = {}
    for group in sorted(widths):
        mine = sums.pop(group, {})
        parts = {
            name: mine[name] if name in mine else torch.zeros(width, dtype=torch.float64, device=device or "cpu")
            for name, width in sorted(widths[group].items())
        }
        together.sum_(list(parts.values()))
        if together.leads:
            total[group] = parts
    return total


def from_first(tensors: Mapping[Any, Tensor], together: Together) -> dict[Any, Tensor]:
    """Give every process tensors that the first one has.

    Args:
        tensors: On the first process.
        together: The processes.

    Returns:
        The same everywhere.
    """
    about = together.one({key: (tuple(part.shape), part.dtype) for key, part in tensors.items()})
    mine = {
        key: tensors[key] if together.leads else torch.empty(shape, dtype=dtype, device="cpu")
        for key, (shape, dtype) in about.items()
    }
    together.from_first_(list(mine.values()))
    return mine
