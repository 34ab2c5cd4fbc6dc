"""Which run a checkpoint is of, and by what versions: no other run and no other version goes on with it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steepest._versions import package_version
from steepest.distributed.checkpoint.tree import pack, unpack
from steepest.training.convert import plain
from steepest.training.errors import CheckpointError
from steepest.training.spec import RunSpec

__all__ = ["check_same_run", "identity"]


def identity(spec: RunSpec) -> dict[str, Any]:
    """What stays the same from one checkpoint of a run to the next.

    Args:
        spec: The run.

    Returns:
        Versions, key, and the run in plain words, to tell what differs; all of it as JSON holds it.
    """
    words = {name: plain(getattr(spec, name)) for name in spec.__dataclass_fields__}
    del words["options_source"], words["untuned"]
    words["source"] = plain(spec.origin().identity())
    versions = {name: package_version(name) for name in ("steepest", "torch")}
    return {"versions": versions, "key": spec.key(), "run": pack(words, "run", {})}


def check_same_run(path: Path, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another run.

    Args:
        path: The checkpoint.
        saved: Its manifest.
        own: What `identity` says of this run.

    Raises:
        CheckpointError: If it is of another run or another version.
    """
    for name, version in saved["versions"].items():
        if own["versions"].get(name) != version:
            raise CheckpointError(
                f"{path} was written with {name} {version}, this is {name} {own['versions'].get(name)}, and another "
                "version does not continue the same run; go on with that version or begin anew with --fresh"
            )
    if saved["key"] == own["key"]:
        return
    then, now = unpack(saved["run"], {}), unpack(own["run"], {})
    changed = [f"{name} was {then.get(name)!r} and is {now[name]!r}" for name in now if then.get(name) != now[name]]
    raise CheckpointError(
        f"{path} is of another run: {'; '.join(changed) or 'its key differs'}; "
        "resume with the same settings, begin anew with --fresh, or use another --out"
    )
