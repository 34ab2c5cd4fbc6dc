"""Herding: the greedy rule against the slow one written out, and what it is for."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from made_rows import chosen
from steepest.selection.herding import Herding, herd


def made(count: int, width: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def distances(features: Tensor, taken: list[int]) -> Tensor:
    """How far from the mean the mean of the taken and one more is, for each one more; infinite for the taken."""
    h = features.double()
    means = (h[taken].sum(0) + h) / (len(taken) + 1)
    far = (means - h.mean(0)).norm(dim=1)
    far[taken] = torch.inf
    return far


def oracle(features: Tensor, count: int) -> list[int]:
    taken: list[int] = []
    for _ in range(count):
        taken.append(int(distances(features, taken).argmin()))
    return taken


@pytest.mark.parametrize("shift", [0.0, 30.0])
@pytest.mark.parametrize("count", [1, 2, 25, 80])
def test_the_choice_is_that_of_the_rule_written_out(count: int, shift: float) -> None:
    features = made(80) + shift
    order, distance = herd(features.clone(), count)
    assert order.tolist() == oracle(features, count)
    h = features.double()
    spread = (h - h.mean(0)).square().sum(1).mean().sqrt()
    assert distance == pytest.approx(float((h[order].mean(0) - h.mean(0)).norm() / spread), abs=1e-6)


@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 6), st.floats(0, 1))
def test_every_step_is_as_good_as_the_best(seed: int, count: int, width: int, part: float) -> None:
    # Small whole numbers: many samples are equal or mirror each other, and ties may fall either way by rounding.
    features = torch.randint(-2, 3, (count, width), generator=torch.Generator().manual_seed(seed)).float()
    order = herd(features.clone(), max(1, round(part * count)))[0].tolist()
    assert len(set(order)) == len(order)
    for step, taken in enumerate(order):
        far = distances(features, order[:step])
        assert float(far[taken]) == pytest.approx(float(far.min()), abs=1e-5)


def test_the_smallest_distance_is_taken_and_not_the_largest() -> None:
    features = torch.tensor([[0.0], [100.0], [1.0], [2.0], [-100.0], [0.6]])
    assert herd(features.clone(), 1)[0].tolist() == [5]
    assert not set(herd(features.clone(), 3)[0].tolist()) & {1, 4}


def test_exact_ties_go_to_the_first_sample() -> None:
    features = torch.tensor([[2.0], [-1.0], [1.0], [-1.0], [1.0], [-2.0]])
    assert herd(features, 6)[0].tolist() == [1, 2, 3, 4, 0, 5]


def test_all_samples_have_the_mean_of_all() -> None:
    order, distance = herd(made(50), 50)
    assert sorted(order.tolist()) == list(range(50))
    assert distance < 1e-6


def test_features_far_from_zero_do_not_drown_the_differences() -> None:
    # Eighths are exact in float32 at 2^20, but their mean is not: the method must not follow a rounded one.
    features = (made(200) * 8).round() / 8 + 2**20
    order, distance = herd(features.clone(), 150)
    h = features.double()
    found = float((h[order].mean(0) - h.mean(0)).norm())
    assert found <= 1.5 * float((h[oracle(features, 150)].mean(0) - h.mean(0)).norm())
    assert distance == pytest.approx(found / float((h - h.mean(0)).square().sum(1).mean().sqrt()), rel=1e-3)


def test_the_first_choice_is_nearest_to_the_mean_and_not_to_its_float32() -> None:
    far = torch.tensor([[100.0], [-91.0], *([50.0], [-50.0]) * 8]).expand(-1, 2)
    features = torch.cat([torch.tensor([[0.0, -1.0], [0.0, 1.0]]), far])  # the mean is (0.45, 0.45)
    assert herd(features / 8 + 2**20, 1)[0].tolist() == [1]


def test_the_kept_mean_is_far_closer_than_a_random_ones() -> None:
    features = made(500, 20)
    found = chosen(Herding(), features, 50)
    random = torch.stack([
        (features[torch.randperm(500, generator=torch.Generator().manual_seed(s))[:50]].mean(0) - features.mean(0))
        for s in range(20)
    ])
    kept = features[found.indices].mean(0) - features.mean(0)
    assert float(kept.norm()) < 0.2 * float(random.norm(dim=1).min())
    spread = (features - features.mean(0)).square().sum(1).mean().sqrt()
    assert found.numbers["mean_distance"] == pytest.approx(float(kept.norm() / spread), rel=1e-3)
