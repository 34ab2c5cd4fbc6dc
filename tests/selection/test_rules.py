"""Rules: who is kept by score, and that the same scores always keep the same ones."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steepest.errors import InvalidOptionError
from steepest.selection.rules import RandomAboveCut, Strata, Top, keep_by_group

RULES = [Top(), Strata(), Strata(spread=None), RandomAboveCut(), RandomAboveCut(tail_cut=0.5, seed=3)]


@given(st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.25, 1.0]), max_size=60), st.data(), st.sampled_from(RULES))
def test_a_rule_keeps_exactly_count_distinct_ascending_positions(scores, data, rule):
    count = data.draw(st.integers(0, len(scores)))
    kept = rule.keep(torch.tensor(scores), count)
    assert kept.dtype == torch.int64
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert len(kept) == count
    assert kept.tolist() == rule.keep(torch.tensor(scores), count).tolist()


def test_top_keeps_the_highest_and_ties_go_to_the_smaller_position():
    scores = torch.tensor([0.5, 0.9, 0.5, 0.5, 1.0])
    assert Top().keep(scores, 3).tolist() == [0, 1, 4]
    assert Top().keep(torch.zeros(5), 2).tolist() == [0, 1]


@pytest.mark.parametrize("rule", [Strata(tail_cut=0.2), RandomAboveCut(tail_cut=0.2)])
def test_nobody_from_the_tail_is_kept(rule):
    scores = torch.randperm(100).float()
    for count in (1, 17, 80):
        assert scores[rule.keep(scores, count)].min() >= 20


@pytest.mark.parametrize("rule", [Strata(tail_cut=0.5), RandomAboveCut(tail_cut=0.5)])
def test_the_tail_is_never_cut_below_the_count(rule):
    scores = torch.arange(10.0)
    assert rule.keep(scores, 8).tolist() == [2, 3, 4, 5, 6, 7, 8, 9]
    assert rule.keep(scores, 10).tolist() == list(range(10))


def test_the_tail_is_a_share_of_the_group_and_not_of_its_rounding():
    kept = Strata(tail_cut=0.29).keep(torch.arange(100.0), 71)  # 0.29 * 100 < 29 in floats
    assert kept.tolist() == list(range(29, 100))


def test_strata_take_the_midpoints_of_equal_strata():
    scores = torch.arange(100.0).flip(0)  # position = rank
    assert Strata(spread=None).keep(scores, 4).tolist() == [12, 37, 62, 87]
    assert Strata(spread=None).keep(scores, 1).tolist() == [50]
    assert Strata(tail_cut=0.2, spread=None).keep(scores, 4).tolist() == [10, 30, 50, 70]


@pytest.mark.parametrize("rule", [Strata(spread=3.0), RandomAboveCut(spread=3.0)])
@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_angles_far_beyond_the_median_are_dropped_where_enough_are_left(rule, scale):
    angles = scale * torch.linspace(1.5, 0.0, 101, dtype=torch.float64)  # the median is half of the largest
    angles[:20] *= 2  # the largest are 4 to 3.2 times it
    scores = angles.cos()
    assert min(rule.keep(scores, 5).tolist()) >= 20
    assert rule.keep(scores, 81).tolist() == list(range(20, 101))
    assert rule.keep(scores, 83).tolist() == list(range(18, 101))  # the best of those beyond


def test_the_stricter_of_spread_and_tail_holds():
    scores = torch.cat([torch.linspace(-0.9, -0.8, 20), torch.linspace(0.8, 0.9, 80)])
    assert min(Strata(tail_cut=0.5).keep(scores, 5).tolist()) >= 50
    assert min(Strata(tail_cut=0.1).keep(scores, 5).tolist()) >= 20


def test_random_choice_depends_on_seed_and_group_only():
    scores = torch.rand(200)
    kept = [RandomAboveCut(seed=s).keep(scores, 50, group=g).tolist() for s, g in [(0, 0), (0, 1), (1, 0), (0, 0)]]
    assert kept[0] == kept[3]
    assert kept[0] != kept[1]
    assert kept[0] != kept[2]
    torch.manual_seed(99)
    assert RandomAboveCut(seed=0).keep(scores, 50).tolist() == kept[0]


def test_a_score_that_moves_across_the_cut_changes_one_random_choice_at_most():
    scores = torch.arange(100.0)
    moved = scores.clone()
    moved[19], moved[20] = scores[20], scores[19]
    before, after = (set(RandomAboveCut(tail_cut=0.2).keep(s, 40).tolist()) for s in (scores, moved))
    assert len(before - after) <= 1


def test_random_choices_are_even_over_what_is_left():
    scores = torch.arange(50.0)
    times = torch.zeros(50)
    for seed in range(300):
        times[RandomAboveCut(tail_cut=0.2, seed=seed).keep(scores, 10)] += 1
    assert times[:10].sum() == 0
    assert times[10:].min() > 40  # 75 expected, standard deviation 7.5
    assert times[10:].max() < 110


def test_groups_are_chosen_apart_and_put_together_in_order():
    scores = torch.tensor([0.1, 0.9, 0.8, 0.2, 0.7, 0.3])
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    assert keep_by_group(scores, labels, 3, "balanced", Top()).tolist() == [1, 3, 5]
    assert keep_by_group(scores, labels, 3, "global", Top()).tolist() == [1, 2, 4]
    assert keep_by_group(scores, None, 3, "auto", Top()).tolist() == [1, 2, 4]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Top().keep(torch.rand(3), 4), r"Cannot keep 4 of scores of shape \(3,\)"),
        (lambda: Top().keep(torch.rand(3, 2), 1), r"shape \(3, 2\)"),
        (lambda: Top().keep(torch.tensor([0.0, float("nan")]), 1), "1 of 2 scores are NaN"),
        (lambda: Strata(tail_cut=1.0), "tail_cut=1.0"),
        (lambda: Strata(tail_cut=-0.1), "tail_cut=-0.1"),
        (lambda: Strata(spread=float("nan")), "spread=nan"),
        (lambda: RandomAboveCut(spread=0.5), "spread=0.5"),
        (lambda: RandomAboveCut(tail_cut=float("nan")), "tail_cut=nan"),
        (lambda: RandomAboveCut(seed=0.5), "seed=0.5"),
    ],
)
def test_impossible_rules_and_scores_are_refused(call, message, teaches):
    with pytest.raises(InvalidOptionError, match=message) as error:
        call()
    teaches(error.value)
