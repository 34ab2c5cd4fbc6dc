"""A process that is gone or silent is told from other errors, and nothing is tried after it."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ranks import run_ranks
from steepest.distributed import Ranks
from steepest.distributed.contact import LostRankError, contact, ending, lost_contact
from steepest.distributed.ranks import RankError

GLOO = "[/third_party/gloo/gloo/transport/tcp/pair.cc:537] "


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError(GLOO + "Read error [127.0.0.1]:38810: Connection reset by peer"), "another process is gone"),
        (RuntimeError(GLOO + "Connection closed by peer [127.0.0.1]:29589"), "another process is gone"),
        (RuntimeError(GLOO + "Timed out waiting 30000ms for recv operation to complete"),
         "another process did not answer within 30 s"),
        (dist.DistBackendError("ncclRemoteError: remote process exited or there was a network error"),
         "another process is gone"),
        (dist.DistBackendError("ncclInvalidUsage: duplicate GPU"), None),
        (dist.DistStoreError("Socket Timeout"), "another process did not answer in time"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (RuntimeError("the database: Connection reset by peer"), None),
        (OSError("gloo: Connection reset by peer"), None),
    ],
)  # fmt: skip
def test_what_errors_tell_about_other_processes(error: Exception, reason: str | None) -> None:
    assert lost_contact(error) == reason


def attempt(action: Any) -> tuple[str, str, float]:
    start = time.monotonic()
    try:
        action()
    except BaseException as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return "none", "", time.monotonic() - start


def left_behind(rank: int, world: int) -> dict[str, Any]:
    ranks = Ranks.current()
    assert ranks is not None
    quick = dist.new_group(timeout=timedelta(seconds=2))
    found: dict[str, Any] = {}
    with contact():
        found["other"] = attempt(lambda: torch.ones(2) @ torch.ones(3))[0]
    if rank == world - 1:
        time.sleep(4)  # the others wait for it in vain, and then it is gone
        dist.destroy_process_group()
        return found
    found["silent"] = attempt(lambda: Ranks(quick).sum_([torch.ones(3)]))
    calls = ranks.traffic.calls
    found["after"] = attempt(lambda: ranks.agree(None))
    found["sums"] = attempt(lambda: ranks.sum_([torch.ones(3)]))
    found["calls"] = ranks.traffic.calls - calls
    with ending(lambda error: SystemExit(f"ended: {error}")):
        found["ending"] = attempt(lambda: ranks.gather(torch.ones(1)))
    return found


def closed(rank: int, world: int) -> Any:
    ranks = Ranks.current()
    assert ranks is not None
    ranks.sum_([torch.ones(1)])
    if rank == 0:
        dist.destroy_process_group()
        return None
    return attempt(lambda: ranks.broadcast_([torch.ones(1)], source=0))


def test_after_lost_contact_nothing_is_tried(tmp_path: Path) -> None:
    assert issubclass(LostRankError, RankError)
    for rank, found in enumerate(run_ranks(3, tmp_path, left_behind)[:2]):
        assert found["other"] == "RuntimeError"
        kind, text, seconds = found["silent"]
        assert (kind, text) == (
            "LostRankError", f"[rank {rank}/3] lost contact: another process did not answer within 2 s"
        )  # fmt: skip
        assert 1 < seconds < 4
        for later in ("after", "sums"):
            kind, again, seconds = found[later]
            assert (kind, again) == ("LostRankError", text)
            assert seconds < 0.1
        assert found["ending"][:2] == ("SystemExit", f"ended: {text}")
        assert found["calls"] == 0


def test_a_connection_that_is_closed_is_noticed_at_once(tmp_path: Path) -> None:
    _, (kind, text, seconds) = run_ranks(2, tmp_path, closed)
    assert (kind, text) == ("LostRankError", "[rank 1/2] lost contact: another process is gone")
    assert seconds < 5
