"""How the processes of a run meet and leave, by the store that torchrun holds for them."""

import itertools
import os
import time
import uuid
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeAlias

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from steepest.distributed.ranks import LostRankError

__all__ = ["Store", "leave", "meet", "said_by"]

Store: TypeAlias = Any  # torch.distributed.Store, which has no public type
_PAUSE = 0.01
_meetings = itertools.count()


def meet(seconds: float) -> tuple[Store, int, int]:
    """Wait until all processes are there.

    torchrun keeps its store when it starts the processes again, and with it the addresses of those that are gone.
    A process that reads one of them fails, and all are started once more. So every start gets a part of the store of
    its own: each process shows the first one a new name, and is answered under that name where it is.

    Args:
        seconds: How long to wait.

    Returns:
        The store, this process's number, and how many there are.

    Raises:
        LostRankError: If some do not come.
    """
    store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=seconds)))
    store.set_timeout(timedelta(seconds=seconds))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return _prefixed(f"meeting {next(_meetings)}", store), rank, size
    start = (_gather if rank == 0 else _join)(_prefixed("steepest", store), rank, size, seconds)
    return _prefixed(start, store), rank, size


def _gather(store: Store, rank: int, size: int, seconds: float) -> str:
    start, deadline, answered = uuid.uuid4().hex, time.monotonic() + seconds, set[bytes]()
    missing = set(range(1, size))
    while missing:
        for other in sorted(missing):
            if store.check([f"{start}/{other}"]):
                missing.remove(other)
            elif store.check([f"name/{other}"]) and (name := store.get(f"name/{other}")) not in answered:
                store.set(f"start/{name.decode()}", start)  # to a process that is gone, it may be
                answered.add(name)
        _wait(missing, deadline, f"[rank {rank}/{size}] rank {min(missing, default=0)}", seconds)
    return start


def _join(store: Store, rank: int, size: int, seconds: float) -> str:
    name, deadline = uuid.uuid4().hex, time.monotonic() + seconds
    store.set(f"name/{rank}", name)
    while not store.check([f"start/{name}"]):
        _wait({0}, deadline, f"[rank {rank}/{size}] rank 0", seconds)
    start = str(store.get(f"start/{name}").decode())
    store.set(f"{start}/{rank}", "here")
    return start


def _wait(missing: set[int], deadline: float, who: str, seconds: float) -> None:
    if missing and time.monotonic() > deadline:
        raise LostRankError(f"{who} did not start within {seconds:g} s")
    time.sleep(_PAUSE if missing else 0)


def _prefixed(prefix: str, store: Store) -> Store:
    return dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]


def leave(store: Store, rank: int, size: int, said: str, seconds: float) -> None:
    """Wait until all processes are about to leave: who closes a connection first may hit one that still reads.

    Args:
        store: The store.
        rank: Number of this process.
        size: How many there are.
        said: What this one has told its user, if it failed.
        seconds: How long to wait; nothing happens if others do not come.
    """
    with suppress(RuntimeError):  # the store may be gone with the first process
        store.set(f"left/{rank}", said)
        everyone = [f"left/{other}" for other in range(size)]
        deadline = time.monotonic() + seconds
        while not store.check(everyone) and time.monotonic() < deadline:
            time.sleep(_PAUSE)


def said_by(store: Store, rank: int) -> str | None:
    """What a process has told its user on leaving.

    Args:
        store: The store.
        rank: Its number.

    Returns:
        The message, empty if it did not fail; None if it has not left.
    """
    with suppress(RuntimeError):
        if store.check([f"left/{rank}"]):
            return str(store.get(f"left/{rank}").decode())
    return None
