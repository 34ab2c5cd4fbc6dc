"""k-center: farthest points against the slow rule written out, the bound of its radius, and ties."""

from __future__ import annotations

from itertools import combinations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from made_rows import chosen
from steepest.selection.k_center import KCenter, farthest_points


def made(count: int, width: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def pairs(features: Tensor) -> Tensor:
    h = features.double()
    return (h.unsqueeze(0) - h.unsqueeze(1)).norm(dim=2)


def oracle(features: Tensor, count: int) -> list[int]:
    between = pairs(features)
    taken = [int((features.double() - features.double().mean(0)).norm(dim=1).argmin())]
    while len(taken) < count:
        nearest = between[:, taken].min(1).values
        nearest[taken] = -1
        taken.append(int(nearest.argmax()))
    return taken


@pytest.mark.parametrize("shift", [0.0, 300.0])
@pytest.mark.parametrize("count", [1, 2, 25, 70])
def test_the_choice_is_that_of_the_rule_written_out(count: int, shift: float) -> None:
    features = made(70) + shift
    order, radius = farthest_points(features.clone(), count)
    assert order.tolist() == oracle(features, count)
    assert radius == pytest.approx(float(pairs(features)[:, order].min(1).values.max()), rel=1e-5)


@given(st.integers(0, 10**6), st.integers(2, 8), st.integers(1, 3))
def test_the_radius_is_at_most_twice_the_smallest(seed: int, count: int, kept: int) -> None:
    features = torch.randint(-3, 4, (count, 2), generator=torch.Generator().manual_seed(seed)).float()
    between = pairs(features)
    kept = min(kept, count)
    _, radius = farthest_points(features.clone(), kept)
    best = min(float(between[:, list(some)].min(1).values.max()) for some in combinations(range(count), kept))
    assert radius <= 2 * best * (1 + 1e-6)


def test_ties_go_to_the_first_sample() -> None:
    corners = torch.tensor([[0.0, 0.0], [1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    assert farthest_points(corners, 3)[0].tolist() == [0, 1, 2]


def test_a_copy_of_a_kept_sample_is_taken_last_of_all() -> None:
    features = made(30)
    features[20:] = features[:10]
    order, radius = farthest_points(features.clone(), 20)
    assert radius == 0
    assert len(torch.unique(features[order], dim=0)) == 20
    assert sorted(farthest_points(features.clone(), 30)[0].tolist()) == list(range(30))


def test_an_outlier_is_kept_second() -> None:
    features = made(40)
    features[17] = 50
    assert 17 in chosen(KCenter(), features, 2).indices.tolist()


@pytest.mark.parametrize("factor", [1.0, 1e-30, 1e30])
def test_the_radius_is_reported_in_the_features_own_scale(factor: float) -> None:
    features = made(40)
    found = chosen(KCenter(), features * factor, 8)
    radius = float(pairs(features)[:, found.indices].min(1).values.max())
    assert found.numbers["radius"] == pytest.approx(radius * factor, rel=1e-5)


def test_the_radius_reported_is_the_largest_of_all_classes() -> None:
    features, labels = made(40), torch.arange(40) % 2
    features[labels == 1] *= 5
    found = chosen(KCenter(), features, 8, labels=labels)
    per_class = [
        float(pairs(features)[labels == c][:, found.indices[labels[found.indices] == c]].min(1).values.max())
        for c in (0, 1)
    ]
    assert per_class[1] > per_class[0]
    assert found.numbers["radius"] == pytest.approx(per_class[1], rel=1e-5)
