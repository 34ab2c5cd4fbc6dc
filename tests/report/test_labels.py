"""Labels beside lines."""

from __future__ import annotations

from itertools import pairwise

import pytest

from steepest.report.labels import shortened, spread_positions


@pytest.mark.parametrize(
    "wanted", [[], [0.3], [0.5, 0.5, 0.5], [0.1, 0.12, 0.9], [0.9, 0.1, 0.11], [0.0, 0.05, 0.1, 0.15]]
)
def test_labels_keep_their_distance_and_their_order(wanted: list[float]) -> None:
    places = spread_positions(wanted, gap=0.1)
    assert len(places) == len(wanted)
    ranked = sorted(places)
    assert all(b - a >= 0.1 - 1e-9 for a, b in pairwise(ranked))
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    assert [places[index] for index in order] == ranked


def test_long_labels_are_cut() -> None:
    assert shortened("abcdefgh", 8) == "abcdefgh"
    assert shortened("abcdefghi", 8) == "abcdefg…"


def test_labels_stay_between_their_ends_and_keep_their_distance() -> None:
    wanted = [0.98, 0.97, 0.99, 0.01, 0.02]
    places = spread_positions(wanted, gap=0.1, low=0.0, top=1.0)
    assert places == pytest.approx([0.9, 0.8, 1.0, 0.0, 0.1])
