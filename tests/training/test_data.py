"""Splits, standardisation, order of the batches."""

from __future__ import annotations

import pytest
import torch

from steepest.training.data import Split, Splits, batches, epoch_order, split_three_ways, standardise


def test_a_split_is_a_function_of_its_seed() -> None:
    inputs, targets = torch.arange(100.0).unsqueeze(1), torch.arange(100)
    first, again, other = (split_three_ways(inputs, targets, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.train.inputs, again.train.inputs)
    assert not torch.equal(first.train.inputs, other.train.inputs)


def test_a_split_holds_every_sample_once() -> None:
    splits = split_three_ways(torch.arange(101.0).unsqueeze(1), torch.arange(101), seed=0)
    parts = [splits.train, splits.val, splits.test]
    assert [len(part) for part in parts] == [61, 20, 20]
    assert torch.cat([part.targets for part in parts]).sort().values.tolist() == list(range(101))
    for part in parts:
        assert torch.equal(part.inputs.squeeze(1).long(), part.targets)


def test_an_empty_part_is_refused() -> None:
    with pytest.raises(ValueError, match="a part would be empty"):
        split_three_ways(torch.zeros(4, 1), torch.zeros(4), seed=0)


def test_only_the_training_split_makes_the_statistics() -> None:
    train = Split(torch.tensor([[1.0, 5.0], [3.0, 5.0]]), torch.tensor([[0.0], [4.0]]))
    rest = Split(torch.full((2, 2), 100.0), torch.full((2, 1), 2.0))
    scaled = standardise(Splits(train, rest, rest), targets=True)
    # The second column is constant in training: it is centred, not divided by zero.
    assert scaled.train.inputs.tolist() == [[-1.0, 0.0], [1.0, 0.0]]
    assert scaled.val.inputs.tolist() == [[98.0, 95.0]] * 2
    assert scaled.train.targets.tolist() == [[-1.0], [1.0]]
    assert scaled.test.targets.tolist() == [[0.0]] * 2


def test_the_order_is_a_function_of_seed_and_epoch_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    orders = {(s, e): epoch_order(50, seed=s, epoch=e).tolist() for s in range(3) for e in range(1, 4)}
    assert len({tuple(order) for order in orders.values()}) == 9
    assert epoch_order(50, seed=2, epoch=3).tolist() == orders[2, 3]
    assert torch.equal(state, torch.get_rng_state())


def test_the_incomplete_batch_is_dropped() -> None:
    split = Split(torch.arange(10.0), torch.arange(10))
    cut = list(batches(split, batch_size=4, seed=0, epoch=1))
    assert [len(inputs) for inputs, _ in cut] == [4, 4]
    assert all(torch.equal(inputs.long(), targets) for inputs, targets in cut)


def test_a_column_that_is_constant_up_to_rounding_is_only_centred() -> None:
    train = Split(torch.full((1000, 1), 0.1), torch.zeros(1000, 1))
    rest = Split(torch.full((2, 1), 0.3), torch.zeros(2, 1))
    scaled = standardise(Splits(train, rest, rest))
    torch.testing.assert_close(scaled.val.inputs, torch.full((2, 1), 0.2))
