"""Collectives over two, three and four processes, and the assignment of work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ranks import run_ranks
from steepest.distributed import Ranks, assign_by_cost
from steepest.distributed.ranks import RankError


def collectives(rank: int, world: int) -> dict[str, Any]:
    ranks = Ranks.current()
    assert ranks is not None
    assert (ranks.rank, ranks.size) == (rank, world)
    mixed = [
        torch.full((3, 2), float(rank)).t(),
        torch.full((2,), rank, dtype=torch.int64),
        torch.full((), rank + 0.5, dtype=torch.float64),
        torch.empty(0),
        torch.full((4,), rank + 1.0),
    ]
    ranks.sum_(mixed)
    own = [torch.full((2, 2), float(rank)).t(), torch.tensor([rank])]
    ranks.broadcast_(own, source=world - 1)
    gathered = ranks.gather(torch.full((rank, 2), float(rank)))
    failures = []
    ranks.agree(None)
    try:
        ranks.agree(ValueError("no such thing") if rank == 1 else None)
    except (ValueError, RankError) as error:
        failures.append(f"{type(error).__name__}: {error}")
    return {
        "sums": [t.tolist() for t in mixed],
        "broadcast": [t.tolist() for t in own],
        "gathered": [t.tolist() for t in gathered],
        "failures": failures,
        "reduced": ranks.traffic.reduced,
        "calls": ranks.traffic.calls,
    }


@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_rank_has_the_same_sums_and_the_same_failure(world: int, tmp_path: Path) -> None:
    total = sum(range(world))
    for rank, found in enumerate(run_ranks(world, tmp_path, collectives)):
        assert found["sums"] == [
            [[float(total)] * 3] * 2,
            [total] * 2,
            total + 0.5 * world,
            [],
            [float(total + world)] * 4,
        ]
        assert found["broadcast"] == [[[world - 1.0] * 2] * 2, [world - 1]]
        assert found["gathered"] == [[[float(r)] * 2] * r for r in range(world)]
        (failure,) = found["failures"]
        said = "ValueError: no such thing"
        assert failure == (said if rank == 1 else f"RankError: Rank 1 of {world} failed, so that none goes on. "
                           f"It said: {said}")  # fmt: skip
        assert found["reduced"] == 4 * 10 + 8 * 2 + 8
        assert found["calls"] == 3 + 2 + 1


def test_one_process_alone_has_no_ranks() -> None:
    assert Ranks.current() is None


@given(st.lists(st.floats(min_value=0, max_value=1e6), max_size=20), st.integers(min_value=1, max_value=6))
def test_no_rank_has_much_more_to_do_than_it_must(costs: list[float], ranks: int) -> None:
    owners = assign_by_cost(costs, ranks)
    assert len(owners) == len(costs)
    loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == rank) for rank in range(ranks)]
    least = max(sum(costs) / ranks, max(costs, default=0.0))
    assert max(loads) <= least * (2 - 1 / ranks) + 1e-6
    assert owners == assign_by_cost(costs, ranks)
