"""Reading a selection under way: the newest whole checkpoint, whatever number of processes wrote it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steepest.distributed.checkpoint.folders import forget
from steepest.distributed.checkpoint.together import choose, lead
from steepest.distributed.checkpoint.tree import blank, leaves, unpack
from steepest.errors import CheckpointError, SelectionError
from steepest.selection.keeping import Keep
from steepest.selection.passes import Passes
from steepest.selection.together import Together, attempt

__all__ = ["KIND", "restored"]

KIND = "selection 2"
_REMEDY = "go on with what it was made with, or delete it to begin anew"


def restored(
    keep: Keep,
    passes: Passes,
    identity: Mapping[str, Any],
    device: torch.device,
    together: Together | None,
    say: Callable[[str], None],
) -> Path | None:
    """Continue the newest checkpoint that is whole, if there is one. All processes must come here.

    Args:
        keep: Where it is kept.
        passes: The selection, at its beginning.
        identity: What it is of.
        device: Where the model is, and where tensors go that were on such a device.
        together: The processes; None for one alone.
        say: Told what is damaged, and what cannot be gone on with.

    Returns:
        It, or None.

    Raises:
        SelectionError: If all are damaged, or it is of another selection.
    """
    from steepest.distributed.checkpoint.tensors import read_tensors

    ranks = None if together is None else together.ranks
    with _as_selection_errors():
        chosen = choose(keep.folder, ranks, say)
    if chosen is None:
        return None
    path, content = chosen
    if content.get("of", "") != keep.of:
        lead(ranks, lambda: forget(keep.folder))
        return None
    with attempt(together):
        _check_same(path, content, identity)
        state = content["state"]
        mine = passes.mine(len(state["shares"]))
        trees = [
            share
            if rank in mine
            else {name: share[name] for name in ("batch", "seen", "seconds", "unchanged")}
            | {"positions": None if share["positions"] is None else [], "digest": share["digest"]}
            for rank, share in enumerate(state["shares"])
        ]
        tensors: dict[str, Tensor] = {leaf["key"]: blank(leaf) for leaf in leaves([state["common"], trees])}
    with _as_selection_errors():
        read_tensors(path, tensors, ranks)
    with attempt(together), _told(path):
        for name in set(content["on device"]) & tensors.keys():
            tensors[name] = tensors[name].to(device)
        common, *shares = unpack([state["common"], *trees], tensors)
        went_on = passes.take_over(common, shares)
        if keep.resumed is not None:
            keep.resumed(max(share["seconds"] for share in shares))
        if not went_on:
            say(
                f"{path} was written by another number of processes in the midst of pass {passes.place[0] + 1}, and "
                "the method does not merge what they had learnt: this pass is begun anew"
            )
    return path


def _check_same(path: Path, content: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    if content.get("kind") != KIND:
        raise SelectionError(
            f"{path} is a checkpoint of {content.get('kind', 'a run')!r}, and this steepest reads {KIND!r} here: name "
            "another folder, or delete it to begin anew."
        )
    found = content["identity"]
    changed = [
        f"its {name} was {found.get(name)!r} and is {value!r}"
        for name, value in identity.items()
        if found.get(name) != value
    ]
    if changed:
        raise SelectionError(f"the checkpoint {path} is of another selection: {'; '.join(changed)}; {_REMEDY}.")


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Say that a state does not fit."""
    try:
        yield
    except SelectionError as error:
        raise SelectionError(f"the checkpoint {path} is of another selection: {error}; {_REMEDY}.") from error
    except (KeyError, TypeError, RuntimeError, ValueError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())[:160]
        raise SelectionError(f"the checkpoint {path} is not complete ({reason}); {_REMEDY}.") from error


@contextmanager
def _as_selection_errors() -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise SelectionError(f"the checkpoint {error}; delete it to begin anew.") from error
