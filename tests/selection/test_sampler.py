"""Samplers of kept samples: each epoch another order, and the same one after a resume."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import steepest as st
from selecting import CROSS_ENTROPY, Toy, net, points
from steepest.errors import InvalidOptionError, SelectionError
from steepest.selection import SelectionSampler
from steepest.selection.sampler import Chosen

INDICES = torch.tensor([3, 5, 8, 13, 21, 34])


def sampler(weights: Tensor | None = None, seed: int = 0) -> SelectionSampler:
    return SelectionSampler(INDICES, torch.ones(6) if weights is None else weights, seed)


def test_each_epoch_holds_every_kept_sample_once_in_another_order() -> None:
    drawn = sampler()
    epochs = [list(drawn) for _ in range(4)]
    assert all(sorted(epoch) == INDICES.tolist() for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert len(drawn) == 6


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    torch.manual_seed(1)
    one = sampler()
    epochs = [list(one) for _ in range(3)]
    torch.manual_seed(2)
    other = sampler()
    other.set_epoch(2)
    assert list(other) == epochs[2]
    other.set_epoch(0)
    assert [list(other), list(other)] == epochs[:2]
    assert list(sampler(seed=1)) != epochs[0]


def test_an_epoch_that_was_left_early_is_not_repeated() -> None:
    whole, left = sampler(), sampler()
    epochs = [list(whole) for _ in range(2)]
    for index in left:
        assert index == epochs[0][0]
        break
    assert list(left) == epochs[1]


@pytest.mark.parametrize("drawn", range(14))
def test_a_sampler_is_resumed_within_an_epoch(drawn: int) -> None:
    def endless(drawing: SelectionSampler) -> list[int]:
        return [index for _ in range(4) for index in drawing]

    expected = endless(sampler())
    first = sampler()
    seen: list[int] = []
    while len(seen) < drawn:
        for index in first:
            seen.append(index)
            if len(seen) == drawn:
                break
    second = sampler(seed=9)
    second.load_state_dict(first.state_dict())
    assert (seen + endless(second))[:24] == expected


def test_a_loader_without_workers_is_resumed_at_its_batch() -> None:
    data = TensorDataset(torch.arange(40))
    whole = [batch.tolist() for (batch,) in DataLoader(data, batch_size=2, sampler=sampler())]
    first = sampler()
    batches = iter(DataLoader(data, batch_size=2, sampler=first))
    assert next(batches)[0].tolist() == whole[0]
    second = sampler()
    second.load_state_dict(first.state_dict())
    rest = [batch.tolist() for (batch,) in DataLoader(data, batch_size=2, sampler=second)]
    assert rest == whole[1:]


def test_a_state_of_another_selection_is_refused() -> None:
    other = SelectionSampler(INDICES[:4], torch.ones(4))
    with pytest.raises(SelectionError, match="the state is of a sampler of 4 samples, this one has 6"):
        sampler().load_state_dict(other.state_dict())


def test_differing_weights_are_drawn_in_proportion() -> None:
    weights = torch.tensor([0.0, 1.0, 2.0, 0.0, 3.0, 0.0])
    drawing = sampler(weights * 6 / weights.sum())
    counts = torch.zeros(40)
    for _ in range(2000):
        for index in drawing:
            counts[index] += 1
    shares = counts[INDICES] / counts.sum()
    assert torch.allclose(shares, weights / 6, atol=0.02)  # four standard deviations
    assert shares[[0, 3, 5]].tolist() == [0.0, 0.0, 0.0]


def test_the_sampler_of_a_selection_draws_its_samples() -> None:
    data = points()
    selection = st.select_subset(net(), data, CROSS_ENTROPY, fraction=0.2, method=Toy())
    loader = DataLoader(TensorDataset(*data), batch_size=4, sampler=selection.sampler(seed=5))
    drawn = torch.cat([x for x, _ in loader])
    assert torch.equal(drawn.sort(0).values, data[0][selection.indices].sort(0).values)


@pytest.mark.parametrize("seed", [-1, 0.5])
def test_bad_seeds_are_refused(seed: float) -> None:
    with pytest.raises(InvalidOptionError, match="seed="):
        sampler(seed=seed)  # type: ignore[arg-type]


class Made:
    """A selection of the samples that a counter stands for."""

    def __init__(self, number: int) -> None:
        self.indices = torch.arange(4) + 10 * number
        self.weights = torch.ones(4)


class Selecting:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Chosen:
        self.calls += 1
        return Made(self.calls)


def test_a_reselecting_sampler_selects_every_few_epochs() -> None:
    select = Selecting()
    drawing = st.ReselectingSampler(select, every=2)
    assert len(drawing) == 4  # asks for the first selection
    tens = [{index // 10 for index in drawing} for _ in range(5)]
    assert tens == [{1}, {1}, {2}, {2}, {3}]
    assert select.calls == 3
    assert drawing.indices.tolist() == [30, 31, 32, 33]


def test_a_reselecting_sampler_sees_the_model_as_it_then_is() -> None:
    model = nn.Linear(4, 3)
    x, y = points()
    hashes: list[str] = []

    def select() -> st.Selection:
        selection = st.select_subset(model, (x, y), CROSS_ENTROPY, fraction=0.2, method=st.EL2N())
        hashes.append(selection.model_hash)
        return selection

    loader = DataLoader(TensorDataset(x, y), batch_size=5, sampler=st.ReselectingSampler(select, every=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        for inputs, targets in loader:
            optimizer.zero_grad()
            CROSS_ENTROPY(model(inputs), targets).mean().backward()
            optimizer.step()
    assert len(set(hashes)) == 3


@pytest.mark.parametrize("drawn", range(17))
def test_a_reselecting_sampler_is_resumed_with_what_it_had_kept(drawn: int) -> None:
    whole = st.ReselectingSampler(Selecting(), every=2, seed=3)
    expected = [index for _ in range(6) for index in whole]
    select = Selecting()
    first = st.ReselectingSampler(select, every=2, seed=3)
    seen: list[int] = []
    while len(seen) < drawn:
        for index in first:
            seen.append(index)
            if len(seen) == drawn:
                break
    second = st.ReselectingSampler(select, every=2)  # the counter goes on as a model's training does
    calls = select.calls
    second.load_state_dict(first.state_dict())
    if drawn % 8 > 0:
        assert second.indices.tolist() == first.indices.tolist()
        assert select.calls == calls
    rest = [index for _ in range(6) for index in second]
    assert (seen + rest)[: len(expected)] == expected


def test_a_state_is_plain_enough_for_a_checkpoint(tmp_path: object) -> None:
    drawing = st.ReselectingSampler(Selecting(), every=2)
    list(drawing)
    path = f"{tmp_path}/state.pt"
    torch.save(drawing.state_dict(), path)
    again = st.ReselectingSampler(Selecting(), every=2)
    again.load_state_dict(torch.load(path, weights_only=True))
    assert list(again) == list(drawing)


def test_a_sampler_of_other_epochs_is_refused() -> None:
    with pytest.raises(SelectionError, match=r"selects every 2 epochs, this one does every 3: make it with every=2"):
        st.ReselectingSampler(Selecting(), every=3).load_state_dict(
            st.ReselectingSampler(Selecting(), every=2).state_dict()
        )
    with pytest.raises(InvalidOptionError, match="every=0"):
        st.ReselectingSampler(Selecting(), every=0)
