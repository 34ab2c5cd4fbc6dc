"""Runs a function in several processes that talk to each other by gloo, as torchrun would start them."""

from __future__ import annotations

import os
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _run(rank: int, world: int, folder: str, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    try:
        result: tuple[str, Any] = ("result", work(rank, world, *args))
    except BaseException as error:
        result = ("error", f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    place = Path(folder, f"{rank}.part")
    place.write_bytes(pickle.dumps(result))
    place.rename(place.with_suffix(".pickle"))
    # Leave together and without taking the group down: who closes a connection first can abort those who still wait.
    deadline = time.monotonic() + 60
    while len(list(Path(folder).glob("*.pickle"))) < world and time.monotonic() < deadline:
        time.sleep(0.02)
    os._exit(0)


def run_ranks(world: int, folder: Path, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``work(rank, world, *args)``, a function of a module, returned on every rank.

    Starting processes takes seconds: one call should check many things.
    """
    folder.mkdir(parents=True, exist_ok=True)
    assert not list(folder.glob("*.pickle")), f"{folder} was used before"
    mp.spawn(_run, args=(world, str(folder), work, args), nprocs=world, join=True)
    found = [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(world)]
    errors = [f"rank {rank}: {value}" for rank, (kind, value) in enumerate(found) if kind == "error"]
    assert not errors, "\n".join(errors)
    return [value for _, value in found]
