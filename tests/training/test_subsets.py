"""Epochs on a subset: as long as on everything, every sample as often, in proportion to weights."""

from __future__ import annotations

import pytest
import torch

from steepest.training.data import Split, epoch_order
from steepest.training.subsets import Subset, subset_batches, subset_order


def test_a_subset_is_gone_through_again_and_again_in_new_orders() -> None:
    subset = Subset(torch.tensor([3, 5, 8, 9, 11]), torch.ones(5))
    order = subset_order(subset, 23, seed=1, epoch=2)
    passes = [part.sort().values.tolist() for part in order.split(5)]
    assert passes[:4] == [[3, 5, 8, 9, 11]] * 4
    assert len({tuple(part.tolist()) for part in order.split(5)}) == 5
    assert sorted(order.bincount()[subset.indices].tolist()) == [4, 4, 5, 5, 5]


def test_the_order_of_a_subset_is_a_function_of_seed_and_epoch_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    for weights in (torch.ones(30), torch.arange(1.0, 31.0)):
        subset = Subset(torch.arange(30), weights)
        orders = {(s, e): subset_order(subset, 60, seed=s, epoch=e).tolist() for s in range(2) for e in (1, 2)}
        assert len({tuple(order) for order in orders.values()}) == 4
        assert subset_order(subset, 60, seed=1, epoch=2).tolist() == orders[1, 2]
    assert torch.equal(state, torch.get_rng_state())


def test_all_of_the_data_as_a_subset_has_the_order_of_all_of_the_data() -> None:
    subset = Subset(torch.arange(50), torch.full((50,), 0.7))
    assert torch.equal(subset_order(subset, 48, seed=2, epoch=3), epoch_order(50, seed=2, epoch=3)[:48])


def test_samples_are_drawn_in_proportion_to_weights_that_differ() -> None:
    subset = Subset(torch.tensor([4, 6, 7]), torch.tensor([0.5, 2.0, 0.0]))
    counts = subset_order(subset, 10_000, seed=0, epoch=1).bincount(minlength=8)
    assert counts[7] == 0
    assert counts.sum() == counts[4] + counts[6] == 10_000
    assert abs(int(counts[4]) - 2000) < 240  # six standard deviations


@pytest.mark.parametrize(("size", "batch"), [(4, 4), (10, 3), (7, 5)])
def test_an_epoch_on_a_subset_has_as_many_full_batches_as_one_on_everything(size: int, batch: int) -> None:
    split = Split(torch.arange(25.0), torch.arange(25))
    subset = Subset(torch.arange(size), torch.ones(size))
    cut = list(subset_batches(split, subset, batch_size=batch, seed=0, epoch=1))
    assert [len(inputs) for inputs, _ in cut] == [batch] * (25 // batch)
    assert all(torch.equal(inputs.long(), targets) and int(targets.max()) < size for inputs, targets in cut)
