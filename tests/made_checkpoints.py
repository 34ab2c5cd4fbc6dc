"""Looks into checkpoints, and forges them: digests and all, as somebody would who wants them to be read."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from steepest.distributed.checkpoint.folders import complete_folders
from steepest.distributed.checkpoint.manifest import check_files, read_manifest, write_manifest
from steepest.distributed.checkpoint.tensors import read_tensors, write_tensors
from steepest.distributed.checkpoint.tree import blank, leaves


def newest(folder: Path) -> Path:
    return complete_folders(folder / "checkpoints")[-1]


def manifest_of(step: Path) -> dict[str, Any]:
    return read_manifest(step)


def tensors_of(step: Path) -> dict[str, torch.Tensor]:
    """All that the manifest speaks of, after a look at every digest."""
    content = read_manifest(step)
    check_files(step, content["files"])
    found = {leaf["key"]: blank(leaf) for leaf in leaves(content["state"])}
    read_tensors(step, found, None)
    return found


def change_manifest(step: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and seal it again."""
    content = read_manifest(step)
    del content["sha256"]
    change(content)
    (step / "manifest.json").unlink()
    write_manifest(step, content)


def reseal(step: Path) -> None:
    """Give the manifest the digests of the files as they are."""
    files = {path.name: path for path in step.iterdir() if path.name != "manifest.json"}
    digests = {
        name: [path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()] for name, path in files.items()
    }
    change_manifest(step, lambda content: content.update(files=digests))


def forge(step: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> dict[str, torch.Tensor]:
    """Write other tensors into a checkpoint, and seal it again."""
    tensors = tensors_of(step)
    generator = {"generators.cpu.0": torch.get_rng_state()}
    change(tensors)
    content = read_manifest(step)
    shutil.rmtree(step)
    step.mkdir()
    files = write_tensors(step, tensors | generator, None)
    del content["sha256"]
    for leaf in leaves(content["state"]):
        leaf["shape"] = list(tensors[leaf["key"]].shape)
    write_manifest(step, json.loads(json.dumps({**content, "files": files})))
    return tensors
