"""What several processes had learnt for SAGE in the midst of a pass, put together for those that go on."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from steepest.linalg import FrequentDirections

if TYPE_CHECKING:
    from steepest.selection.sage import SAGE

__all__ = ["OWN", "merged", "with_rows", "without_rows"]

# By the step of a pass: what differs between the processes in the midst of it.
OWN = {
    "sketch": ("fd", "means", "shapes", "by_class", "sizes"),
    "mean": ("sums", "counts", "projections", "zeros"),
    "score": ("scores", "zeros"),
}
_ROWS = ("scores", "projections")  # one for every sample of the data


def without_rows(own: Mapping[str, Any], positions: Tensor) -> dict[str, Any]:
    """Keep of scores and projections those of the samples that were read.

    Args:
        own: A part of the state of a run.
        positions: ``[n]``: the samples.

    Returns:
        The same part.
    """
    return {name: part[positions] if name in _ROWS and len(part) else part for name, part in own.items()}


def with_rows(
    own: Mapping[str, Any], blank: Mapping[str, Any], shares: Sequence[tuple[Mapping[str, Any], Tensor]]
) -> dict[str, Any]:
    """Put scores and projections where their samples are.

    Args:
        own: A part of the state of a run.
        blank: The state at the beginning of the pass, with room for every sample.
        shares: What each process had, and its samples.

    Returns:
        The same part.
    """
    found = dict(own)
    for name in _ROWS:
        if name in own:
            found[name] = blank[name]
            for share, positions in shares:
                if len(share[name]):
                    found[name][positions] = share[name]
    return found


def merged(method: "SAGE", blank: Mapping[str, Any], shares: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge sketches in the order of the shares, and add up sums and numbers; rows of samples are left out.

    Args:
        method: The options.
        blank: A part of the state at the beginning of the pass.
        shares: The same part of each process's state.

    Returns:
        The same part; of one share what it has, to the bit.
    """
    if len(shares) == 1:
        return dict(shares[0])
    return {name: _merged(method, name, first, [share[name] for share in shares]) for name, first in blank.items()}


def _merged(method: "SAGE", name: str, blank: Any, parts: Sequence[Any]) -> Any:
    if name in _ROWS:
        return blank
    if name == "fd":
        return _merged_sketch(method, parts)
    if name == "means":
        return {"sums": _added_sums([part["sums"] for part in parts]), "counts": _added(p["counts"] for p in parts)}
    if name in {"shapes", "by_class"}:  # known to those that have read a batch
        return next((part for part in parts if part or part is False), blank)
    return sum(parts) if name == "zeros" else _added(parts)


def _merged_sketch(method: "SAGE", parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    sketches = [FrequentDirections(method.sketch_size, robust=method.robust) for _ in parts]
    for sketch, part in zip(sketches, parts, strict=True):
        sketch.load_state_dict(part)
    whole, *others = sketches or [FrequentDirections(method.sketch_size, robust=method.robust)]
    for sketch in others:
        whole.merge(sketch)
    return whole.state_dict()


def _added(parts: Any) -> dict[int, Any]:
    """Numbers or tensors by group, added up."""
    total: dict[int, Any] = {}
    for part in parts:
        for group, value in part.items():
            total[group] = total[group] + value if group in total else value
    return total


def _added_sums(parts: Sequence[Mapping[int, Mapping[str, Tensor]]]) -> dict[int, dict[str, Tensor]]:
    groups = {group: None for part in parts for group in part}
    return {
        group: {name: sum(sums[1:], start=sums[0]) for name, sums in _by_name([p[group] for p in parts if group in p])}
        for group in groups
    }


def _by_name(parts: Sequence[Mapping[str, Tensor]]) -> list[tuple[str, list[Tensor]]]:
    return [(name, [part[name] for part in parts]) for name in parts[0]]
