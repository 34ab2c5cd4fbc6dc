"""The look at what was kept, against all pairs made one by one."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import steepest as st
from selecting import CROSS_ENTROPY, Toy, net, points


def choose(data: Any, model: nn.Module | None = None, **options: Any) -> st.Selection:
    options = {"fraction": 0.4, "method": Toy(), "batch_size": 8} | options
    return st.select_subset(model or net(), data, CROSS_ENTROPY, **options)


def pairs(model: nn.Module, x: Tensor, y: Tensor, names: tuple[str, ...]) -> float:
    """Mean cosine between the gradients of two samples, by a loop over all pairs."""
    model.eval()
    named = dict(model.named_parameters())
    rows = []
    for one, label in zip(x, y, strict=True):
        loss = CROSS_ENTROPY(model(one[None]), label[None]).sum()
        grads = torch.autograd.grad(loss, [named[name] for name in names])
        rows.append(torch.cat([grad.flatten() for grad in grads]).double())
    cosines = [
        float(torch.nn.functional.cosine_similarity(a, b, dim=0)) for i, a in enumerate(rows) for b in rows[i + 1 :]
    ]
    return sum(cosines) / len(cosines)


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(*points(), strict=True))


@pytest.mark.parametrize("stream", [False, True])
def test_the_mean_cosine_is_that_of_all_pairs(stream: bool) -> None:
    x, y = points()
    selection = choose(Stream() if stream else (x, y))
    expected = pairs(net(), x[selection.indices], y[selection.indices], ("3.weight", "3.bias"))
    assert selection.report.mean_cosine == pytest.approx(expected, abs=1e-6)


def test_the_mean_cosine_is_that_of_the_scope() -> None:
    x, y = points()
    selection = choose((x, y), method=Toy(scope="all"))
    names = tuple(name for name, _ in net().named_parameters())
    expected = pairs(net(), x[selection.indices], y[selection.indices], names)
    assert selection.report.mean_cosine == pytest.approx(expected, abs=1e-6)
    assert expected != pytest.approx(pairs(net(), x[selection.indices], y[selection.indices], names[-2:]), abs=1e-3)


def test_a_stream_is_filtered_on_the_way() -> None:
    x, y = points()
    batches = [(x[:33], y[:33]), (x[33:], y[33:])]
    found, expected = choose(batches, batch_size=None), choose((x, y), batch_size=33)
    assert torch.equal(found.indices, expected.indices)
    assert found.report.mean_cosine == pytest.approx(expected.report.mean_cosine, abs=1e-6)


@pytest.mark.parametrize("stream", [False, True])
def test_duplicates_are_counted_by_their_input(stream: bool) -> None:
    x, y = points()
    x = x.clone()
    x[10], x[20], x[30] = x[0], x[0], x[1]  # with other labels: 0 and 10 and 20 differ in them
    data: Any = [(x[:33], y[:33]), (x[33:], y[33:])] if stream else (x, y)
    selection = choose(data, fraction=1.0, batch_size=None)
    assert selection.report.duplicates == 3


def test_duplicates_among_the_dropped_do_not_count() -> None:
    x, y = points()
    x = x.clone()
    first = choose((x, y))
    dropped = [i for i in range(50) if i not in set(first.indices.tolist())]
    report = st.select_subset(None, (x, y), fraction=0.2, method=st.Random()).report
    assert report.duplicates == 0
    x[:] = x[0]
    assert st.select_subset(None, (x, y), fraction=0.2, method=st.Random()).report.duplicates == 9
    assert dropped


def test_gradients_of_zero_have_no_direction() -> None:
    model = nn.Linear(2, 1, bias=False)
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    data = TensorDataset(x, torch.zeros(4))
    selection = st.select_subset(
        model, data, lambda o, t: o.squeeze(1) - t, fraction=1.0, method=st.Random(class_policy="global")
    )
    assert selection.report.mean_cosine == pytest.approx(1 / 3)  # of three pairs one is parallel, two are square


def test_one_sample_has_no_pair() -> None:
    x, _ = points()
    selection = choose((x, torch.zeros(50, dtype=torch.int64)), fraction=None, count=1)
    assert selection.report.mean_cosine is None


def test_no_review_is_made_where_none_is_wanted() -> None:
    report = choose(points(), review=False).report
    assert (report.mean_cosine, report.duplicates, report.review_seconds) == (None, None, 0.0)


class Counting(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self) -> None:
        self.asked: list[int] = []

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.asked.append(index)
        x, y = points()
        return x[index], y[index]


def test_only_the_kept_samples_are_read_and_apart_from_the_clock() -> None:
    data = Counting()
    selection = choose(DataLoader(data, batch_size=8, shuffle=True), batch_size=None)
    assert data.asked == [*range(50), *range(50), *selection.indices.tolist()]
    assert selection.report.review_seconds > 0


def test_a_collate_function_of_the_users_is_used_in_the_review() -> None:
    def collate(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return 2 * torch.stack([x for x, _ in items]), torch.stack([y for _, y in items])

    x, y = points()
    selection = choose(DataLoader(Counting(), batch_size=8, collate_fn=collate), batch_size=None)
    expected = pairs(net(), 2 * x[selection.indices], y[selection.indices], ("3.weight", "3.bias"))
    assert selection.report.mean_cosine == pytest.approx(expected, abs=1e-6)
