"""Teams of ranks: their size, and the work that is divided among them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steepest.distributed import assign_by_cost
from steepest.distributed.ranks import Ranks
from steepest.distributed.teams import Teams, team_size
from steepest.errors import InvalidOptionError


@given(st.floats(0, 1, exclude_min=True), st.integers(1, 64))
def test_a_team_has_the_size_nearest_to_its_fraction_that_divides_the_ranks(fraction: float, ranks: int) -> None:
    size = team_size(fraction, ranks)
    assert ranks % size == 0
    assert all(
        abs(size - fraction * ranks) <= abs(other - fraction * ranks)
        for other in range(1, ranks + 1)
        if ranks % other == 0
    )
    assert team_size(1.0, ranks) == ranks
    assert all(team_size(of / ranks, ranks) == of for of in range(1, ranks + 1) if ranks % of == 0)


@pytest.mark.parametrize(("fraction", "ranks"), [(0.0, 4), (1.1, 4), (float("nan"), 4), (0.5, 0)])
def test_an_impossible_team_is_refused(fraction: float, ranks: int) -> None:
    with pytest.raises(InvalidOptionError):
        team_size(fraction, ranks)


@given(st.lists(st.floats(0, 1e6), max_size=12), st.sampled_from([(4, 2), (6, 2), (6, 3), (8, 4), (5, 5), (5, 1)]))
def test_work_goes_to_the_team_with_least_and_to_the_member_with_least(
    costs: list[float], shape: tuple[int, int]
) -> None:
    ranks, team = shape
    owners = assign_by_cost(costs, ranks, team)
    assert [owner // team for owner in owners] == assign_by_cost(costs, ranks // team)
    for number in range(ranks // team):
        mine = [(cost, owner % team) for cost, owner in zip(costs, owners, strict=True) if owner // team == number]
        assert [place for _, place in mine] == assign_by_cost([cost for cost, _ in mine], team)
    if team in {1, ranks}:
        assert owners == assign_by_cost(costs, ranks)


def test_teams_of_one_and_of_all_need_no_group_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "size", property(lambda _: 4))
    ranks = Ranks()
    one, all_ = (Teams.of(ranks, size, None) for size in (1, 4))  # type: ignore[arg-type]
    assert (one.inside, one.across) == (None, ranks)
    assert (all_.inside, all_.across) == (ranks, None)
