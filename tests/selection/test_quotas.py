"""Quotas: sums to the sample, caps at class sizes, and how what is left over is spread."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steepest.errors import InvalidOptionError
from steepest.selection.quotas import class_weights, groups, quotas, settled

LABELS = st.lists(st.integers(-3, 12), min_size=1, max_size=200)


def labels_of(sizes: dict[int, int]) -> torch.Tensor:
    return torch.tensor([label for label, size in sizes.items() for _ in range(size)])


@given(LABELS, st.data(), st.sampled_from(["global", "balanced", "proportional", "auto"]))
def test_quotas_sum_to_the_count_and_no_class_gives_more_than_it_has(numbers, data, policy):
    labels = torch.tensor(numbers)
    count = data.draw(st.integers(0, len(numbers)))
    found = quotas(labels, count, policy)
    members = groups(labels, policy)
    assert sum(found.values()) == count
    assert list(found) == sorted(found) == list(members)
    assert all(0 <= found[group] <= len(members[group]) for group in found)


@given(LABELS, st.data())
def test_balanced_quotas_differ_by_one_at_most_among_classes_with_room(numbers, data):
    labels = torch.tensor(numbers)
    found = quotas(labels, data.draw(st.integers(0, len(numbers))), "balanced")
    sizes = {label: numbers.count(label) for label in found}
    most = max(found.values())
    for label, quota in found.items():
        assert quota >= min(sizes[label], most - 1)
    with_room = [found[label] for label in found if found[label] < sizes[label]]
    assert with_room == sorted(with_room, reverse=True)  # one more goes to smaller class numbers


@given(LABELS, st.data())
def test_proportional_quotas_are_within_one_of_the_exact_share(numbers, data):
    labels = torch.tensor(numbers)
    count = data.draw(st.integers(0, len(numbers)))
    for label, quota in quotas(labels, count, "proportional").items():
        assert abs(quota - count * numbers.count(label) / len(numbers)) < 1


def test_a_class_that_is_too_small_leaves_its_share_to_the_others():
    assert quotas(labels_of({0: 100, 1: 2, 2: 50, 3: 100}), 100, "balanced") == {0: 33, 1: 2, 2: 33, 3: 32}
    assert quotas(labels_of({0: 1, 1: 2, 2: 50}), 30, "balanced") == {0: 1, 1: 2, 2: 27}


def test_the_largest_remainder_is_rounded_up_and_ties_go_to_the_smaller_class():
    assert quotas(labels_of({0: 7, 1: 2, 2: 1}), 5, "proportional") == {0: 4, 1: 1, 2: 0}  # 3.5, 1, 0.5
    assert quotas(labels_of({5: 6, 7: 7, 9: 7}), 10, "proportional") == {5: 3, 7: 4, 9: 3}  # 3, 3.5, 3.5


def test_remainders_are_whole_numbers_where_floats_would_round():
    big = {0: 10**5, 1: 10**5, 2: 10**5 + 1}
    found = quotas(labels_of(big), 10**5, "proportional")
    assert found == {0: 33333, 1: 33333, 2: 33334}


def test_one_sample_goes_to_the_smallest_class_number_and_all_samples_to_everyone():
    labels = labels_of({3: 4, 1: 2})
    assert quotas(labels, 1, "balanced") == {1: 1, 3: 0}
    assert quotas(labels, 6, "balanced") == quotas(labels, 6, "proportional") == {1: 2, 3: 4}


def test_groups_are_ascending_positions():
    found = groups(torch.tensor([2, 0, 2, 1, 0], dtype=torch.int32), "balanced")
    assert {label: positions.tolist() for label, positions in found.items()} == {0: [1, 4], 1: [3], 2: [0, 2]}
    assert groups(torch.tensor([2, 0]), "global")[-1].tolist() == [0, 1]
    assert groups(None, "auto", 3)[-1].tolist() == [0, 1, 2]


def test_auto_is_balanced_with_labels_and_global_without():
    assert settled("auto", torch.tensor([0, 1])) == "balanced"
    assert settled("auto", None) == "global"
    assert quotas(None, 7, "auto") == {-1: 7}
    assert quotas(torch.tensor([0, 0, 0, 1]), 2, "auto") == {0: 1, 1: 1}


def test_class_weights_give_classes_their_share_back_with_mean_one():
    labels = labels_of({4: 90, 8: 10})
    indices = torch.tensor([0, 1, 90, 91])
    weights = class_weights(indices, labels)
    torch.testing.assert_close(weights, torch.tensor([1.8, 1.8, 0.2, 0.2]))
    assert weights.dtype == torch.float32


@pytest.mark.parametrize("policy", ["balanced", "proportional"])
def test_a_policy_by_class_without_labels_is_refused_with_the_remedy(policy, teaches):
    with pytest.raises(InvalidOptionError, match=r'no whole-number labels.*class_policy="global"') as error:
        quotas(None, 3, policy)
    teaches(error.value)


def test_a_policy_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(InvalidOptionError, match="class_policy='fair': choose one of 'auto', 'global', 'balanced'"):
        quotas(torch.tensor([0, 1]), 1, "fair")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quotas(torch.tensor([0, 1]), 3, "balanced"), "count=3: there are only 2 samples"),
        (lambda: quotas(torch.tensor([0, 1]), 3, "global"), "count=3: there are only 2 samples"),
        (lambda: quotas(torch.tensor([0, 1]), -1, "balanced"), "count=-1"),
        (lambda: quotas(torch.tensor([0.5, 1.0]), 1, "balanced"), "one whole number per sample"),
        (lambda: quotas(torch.tensor([[0, 1]]), 1, "balanced"), r"shape \(1, 2\)"),
        (lambda: groups(None, "global"), "num_samples"),
    ],
)
def test_impossible_quotas_are_refused(call, message, teaches):
    with pytest.raises(InvalidOptionError, match=message) as error:
        call()
    teaches(error.value)
