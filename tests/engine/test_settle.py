"""Where the samples are, when sizes alone do not say it: gradients of some samples against those of the record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.watching import Seen
from steepest.errors import UnsupportedModelError
from zoo_parts import Net

ROWS, LENGTH, WIDTH = 4, 6, 5
L = nn.Linear


def first_two(model: nn.Module, x: Tensor, loss: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    """Gradients of the losses of the first two samples, by autograd alone."""
    model.zero_grad()
    loss(model(x))[:2].sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def check(
    model: nn.Module, x: Tensor, loss: Callable[[Any], Tensor] = lambda out: out.square().flatten(1).sum(1)
) -> None:
    expected = first_two(model, x, loss)
    with Seen(model) as seen:
        for _ in range(2):  # found once, then remembered
            seen.records.clear()
            loss(model(x)).sum().backward()
            found = seen.sums(lambda _: slice(0, 2))
            for name, grad in found.items():
                torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-12)
            assert found.keys() == expected.keys()
            model.zero_grad()


def points(rows: int = ROWS, length: int = LENGTH) -> Tensor:
    return torch.randn(rows, length, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_positions_before_samples_in_one_dimension_are_told_from_samples_before_positions() -> None:
    def by_position(net: Net, x: Tensor) -> Tensor:
        return net.a(x.transpose(0, 1).reshape(-1, WIDTH)).tanh().view(LENGTH, ROWS, 3).transpose(0, 1)

    def by_sample(net: Net, x: Tensor) -> Tensor:
        return net.a(x.reshape(-1, WIDTH)).tanh().view(ROWS, LENGTH, 3)

    for run in (by_position, by_sample):
        check(Net(run, a=L(WIDTH, 3)).double(), points())


@pytest.mark.parametrize("batch_first", [True, False])
def test_as_many_positions_as_samples(batch_first: bool) -> None:
    def run(net: Net, x: Tensor) -> Tensor:
        inner = x if batch_first else x.transpose(0, 1)
        out = net.b(net.a(inner).tanh())
        return out if batch_first else out.transpose(0, 1)

    check(Net(run, a=L(WIDTH, 3), b=L(3, 2)).double(), points(ROWS, ROWS))


@pytest.mark.parametrize("rows", [2, 4, 8])
def test_one_sample_with_huge_gradients_does_not_hide_the_others(rows: int) -> None:
    """Only the last position counts, and nearly all of the gradient belongs to the first sample."""

    def run(net: Net, x: Tensor) -> Tensor:
        return net.a(x).tanh()[:, -1] * torch.tensor([100.0] + [1.0] * (rows - 1), dtype=x.dtype).unsqueeze(1)

    for seed in range(4):
        torch.manual_seed(seed)
        check(Net(run, a=L(WIDTH, 3)).double(), points(rows, rows))


def test_the_output_may_be_nested_and_have_other_tensors() -> None:
    def run(net: Net, x: Tensor) -> Any:
        h = net.a(x.transpose(0, 1).reshape(-1, WIDTH)).tanh().view(LENGTH, ROWS, 3)
        return {"ids": torch.arange(ROWS), "last": [h.mean((0, 1)), (h.mean(0),)], "none": None}

    check(Net(run, a=L(WIDTH, 3)).double(), points(), lambda out: out["last"][1][0].square().sum(1))


def test_batch_statistics_do_not_hide_the_samples() -> None:
    def run(net: Net, x: Tensor) -> Tensor:
        return net.n(net.a(x.transpose(0, 1).reshape(-1, WIDTH))).tanh().view(12, 16, 3).transpose(0, 1)

    model = Net(run, a=L(WIDTH, 3), n=nn.BatchNorm1d(3)).double()
    with Seen(model) as seen:
        x = points(16, 12)
        model(x).square().sum().backward()
        (record,) = seen.records
        # Row n of the record is made of the inputs of sample n.
        inputs, _ = record.positions("expand")
        torch.testing.assert_close(inputs[..., :WIDTH], x)


def test_what_mixes_all_samples_alike_is_refused_by_name(teaches: Callable[[Exception], None]) -> None:
    def run(net: Net, x: Tensor) -> Tensor:
        return net.a(x.reshape(-1, WIDTH)).mean(0).expand(ROWS, 3)

    model = Net(run, a=L(WIDTH, 3)).double()
    with Seen(model), pytest.raises(UnsupportedModelError, match=r"'a\.weight'.*\(24,\).*all of them alike") as caught:
        model(points())
    teaches(caught.value)


def test_an_output_without_samples_is_refused_by_name(teaches: Callable[[Exception], None]) -> None:
    model = Net(lambda n, x: n.a(x.reshape(-1, WIDTH)), a=L(WIDTH, 3)).double()
    with Seen(model), pytest.raises(UnsupportedModelError, match=r"'a\.weight'.*no tensor with the batch") as caught:
        model(points())
    teaches(caught.value)
    with Seen(model, exact=False) as seen:  # sums over everything do not ask
        model(points()).square().sum().backward()
        seen.check()


def test_gradients_that_vanish_settle_nothing() -> None:
    """A layer multiplied by zero at first: the layout is found when a gradient comes."""

    def run(net: Net, x: Tensor) -> Tensor:
        return net.gate * net.a(x.transpose(0, 1).reshape(-1, WIDTH)).tanh().view(LENGTH, ROWS, 3).transpose(0, 1)

    model = Net(run, a=L(WIDTH, 3)).double()
    model.gate = torch.zeros((), dtype=torch.float64)
    with Seen(model) as seen:
        model(points()).sum().backward()
        assert not seen.watch._settled
        model.gate = torch.ones((), dtype=torch.float64)
        model.zero_grad()
        seen.records.clear()
        model(points()).square().sum().backward()
        assert seen.watch._settled
        found = seen.sums(lambda _: slice(0, 2))
    expected = first_two(model, points(), lambda out: out.square().flatten(1).sum(1))
    torch.testing.assert_close(found["a.weight"], expected["a.weight"])


def test_the_users_random_numbers_and_gradients_are_left_alone() -> None:
    def run(net: Net, x: Tensor) -> Tensor:
        return net.a(x.transpose(0, 1).reshape(-1, WIDTH)).view(LENGTH, ROWS, 3).transpose(0, 1)

    model = Net(run, a=L(WIDTH, 3)).double()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    with Seen(model):
        model(points())
    assert torch.equal(torch.rand(1), expected)
    assert model.a.weight.grad is None
