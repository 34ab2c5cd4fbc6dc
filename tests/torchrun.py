"""Runs commands on two processes, as torchrun starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from steepest.distributed.checkpoint.folders import complete_folders

TRAIN = ("-m", "steepest", "train", "digits", "-o", "adam", "--epochs", "40", "--set", "lr=0.002",
         "--checkpoint-every", "0.3")  # fmt: skip


def torchrun(*arguments: str, **settings: str) -> subprocess.Popen[str]:
    """Starts them, in a session of their own, so that a signal can go to all as a terminal sends it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "STEEPEST_TIMEOUT": "30", **settings}
    return subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def workers(parent: int) -> list[int]:
    """The processes that torchrun has started and that live."""
    listing = ["ps", "-o", "pid=,stat=", "--ppid", str(parent)]
    found = subprocess.run(listing, capture_output=True, text=True, check=False).stdout.splitlines()
    return [int(pid) for pid, state in map(str.split, found) if not state.startswith("Z")]


def losses_in(folder: Path) -> list[float]:
    """Validation losses of a finished run."""
    (path,) = (folder / "records").glob("*.jsonl")
    record = json.loads(path.read_text())
    assert record["status"] == "finished", record["error"]
    assert record["environment"]["processes"] == 2
    return [point["val_loss"] for point in record["history"]]


def wait_for_checkpoint(folder: Path, process: subprocess.Popen[str], newer_than: Sequence[Path] = ()) -> None:
    """Until there is one, or another one."""
    deadline = time.monotonic() + 120
    while not set(complete_folders(folder / "checkpoints")) - set(newer_than):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_workers(process: subprocess.Popen[str]) -> list[int]:
    """Until both live."""
    deadline = time.monotonic() + 120
    while len(found := workers(process.pid)) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found
