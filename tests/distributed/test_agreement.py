"""Work of which every process does a part: all get theirs, or all fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ranks import run_ranks
from steepest.distributed.agreement import NonFiniteRankError, attempt_together
from steepest.distributed.ranks import RankError, Ranks
from steepest.errors import NonFiniteError


def parts(rank: int, world: int) -> dict[str, Any]:
    ranks, device = Ranks(), torch.device("cpu")

    def failing(error: Exception, where: int) -> str:
        def part() -> int:
            if rank == where:
                raise error
            return rank

        try:
            attempt_together(ranks, part, device)
        except Exception as raised:
            kinds = [kind.__name__ for kind in (NonFiniteRankError, RankError) if isinstance(raised, kind)]
            return f"{(kinds or [type(raised).__name__])[0]}: {raised}"
        return "nothing"

    found: dict[str, Any] = {"given": attempt_together(ranks, lambda: [rank], device), "bytes": ranks.traffic.reduced}
    found["error"] = failing(KeyError("user"), 1)
    found["nan"] = failing(NonFiniteError("too large"), 0)
    found["after"] = attempt_together(ranks, lambda: rank + 10, device)
    return found


def test_what_fails_on_one_process_fails_on_all_and_costs_eight_bytes(tmp_path: Path) -> None:
    world = 3
    for rank, found in enumerate(run_ranks(world, tmp_path, parts)):
        assert found["given"] == [rank]
        assert found["bytes"] == 8
        assert found["error"].startswith("KeyError" if rank == 1 else "RankError: Rank 1 of 3 failed"), found
        assert found["nan"].startswith("NonFiniteError" if rank == 0 else "NonFiniteRankError: Rank 0"), found
        assert found["after"] == rank + 10
