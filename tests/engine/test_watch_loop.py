"""What the watch tells of an ordinary training loop, against autograd on the same loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from capturing import mlp, points
from engine.watching import Seen
from zoo_parts import Net, two_layers

L, S = nn.Linear, nn.Sequential


def test_two_forwards_before_one_backward() -> None:
    model = mlp()
    with Seen(model) as seen:
        (model(points(6)).square().sum() + model(points(4)).sin().sum()).backward()
        seen.check()
        assert seen.forwards == [6, 4]
        assert sorted(r.num_rows for r in seen.records) == [4, 4, 6, 6]


def test_a_forward_of_which_only_one_gets_a_backward() -> None:
    model = mlp()
    with Seen(model) as seen:
        model(points(4))
        model(points(6)).square().sum().backward()
        seen.check()
        assert [r.num_rows for r in seen.records] == [6, 6]


def test_a_second_backward_of_one_graph_is_seen_a_second_time() -> None:
    model = mlp()
    with Seen(model) as seen:
        loss = model(points()).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        seen.check()
        assert len(seen.records) == 4


def test_accumulated_backwards_add_up() -> None:
    model = mlp()
    with Seen(model) as seen:
        for rows in (3, 5, 1):
            model(points(rows)).square().mean().backward()
        seen.check()


@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "eval_no_grad"])
def test_a_forward_without_gradients_is_not_seen(how: str) -> None:
    model = mlp()
    context = torch.inference_mode if how == "inference_mode" else torch.no_grad
    with Seen(model) as seen:
        loss = model(points()).square().sum()
        with context():
            (model.eval() if how.startswith("eval") else model)(points(3))
        loss.backward()
        seen.check()
        assert seen.forwards == [6]


def test_a_forward_that_is_not_due_is_not_seen() -> None:
    model = mlp()
    with Seen(model, due=lambda: False) as seen:
        model(points()).sum().backward()
        assert seen.forwards == seen.records == []


def test_a_model_that_calls_itself_is_seen_once() -> None:
    model = Net(lambda n, x, deep=True: n.b(n(x, False).tanh()) if deep else n.a(x), a=L(5, 4), b=L(4, 3)).double()
    with Seen(model) as seen:
        model(points()).square().sum().backward()
        seen.check()
        assert seen.forwards == [6]


def test_two_watches_of_one_model_see_the_same() -> None:
    model = mlp()
    with Seen(model) as one, Seen(model) as two:
        model(points()).square().sum().backward()
        one.check()
        two.check()


@pytest.mark.parametrize("part", ["first", "last"])
def test_parameters_that_are_frozen_or_unwatched_cost_no_records(part: str) -> None:
    model = mlp()
    model[0 if part == "first" else 2].requires_grad_(False)
    with Seen(model) as seen:
        model(points()).square().sum().backward()
        seen.check()
        assert len(seen.records) == 1


# -- backwards that train nothing ------------------------------------------------------------------


def test_gradients_in_the_inputs_alone_are_not_taken_for_the_training_backward() -> None:
    """As adversarial training takes them before every step."""
    model, x = mlp(), points().requires_grad_()
    with Seen(model) as seen:
        (towards,) = torch.autograd.grad(model(x).square().sum(), x)
        assert seen.records == []
        model(x).square().sum().backward(inputs=[x])
        assert seen.records == []
        model((x + 0.1 * towards.sign()).detach()).square().sum().backward()
        seen.check()


@pytest.mark.parametrize("how", ["grad", "backward"])
def test_gradients_in_some_parameters_are_seen(how: str) -> None:
    model = mlp()
    with Seen(model) as seen:
        loss, params = model(points()).square().sum(), list(model.parameters())
        if how == "grad":
            for p, grad in zip(params, torch.autograd.grad(loss, params), strict=True):
                p.grad = grad
        else:
            loss.backward(inputs=params)
        seen.check()


# -- checkpoints and autocast ----------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True])
def test_checkpointing_is_seen_once(whole: bool) -> None:
    model = two_layers().double()
    if not whole:
        model.run = lambda n, x: n.b(checkpoint(lambda h: n.a(h).tanh(), x, use_reentrant=False))
    with Seen(model) as seen:
        out = checkpoint(model, points(), use_reentrant=False) if whole else model(points())
        out.square().sum().backward()
        seen.check()
        assert len(seen.records) == 2


def test_autocast_is_seen_in_full_precision() -> None:
    model = S(L(5, 6), nn.ReLU(), L(6, 3))
    x = torch.randn(6, 5)
    with Seen(model) as seen:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
            loss = F.cross_entropy(out, torch.arange(6) % 3)
        loss.backward()
        assert out.dtype == torch.bfloat16
        assert all(grad.dtype == torch.float32 for grad in seen.sums().values())
        seen.check(2e-2)


@pytest.mark.parametrize("shape", [(0, 5), (0, 4, 5)])
def test_an_empty_batch_is_seen_as_one(shape: tuple[int, ...]) -> None:
    model = nn.Linear(5, 3)
    with Seen(model) as seen:
        model(torch.randn(shape)).sum().backward()
        assert [record.num_rows for record in seen.records] == [0]


@pytest.mark.parametrize("layer", [L(5, 3), nn.Conv1d(5, 3, 1)], ids=["linear", "convolution"])
def test_layers_that_are_frozen_later_are_passed_over(layer: nn.Module) -> None:
    """As where only one of two networks is trained in turn."""
    model = Net(lambda n, x: n.b(n.a(x).flatten(1)), a=layer, b=L(3, 2))
    x = torch.randn(4, 5, *[1] * isinstance(layer, nn.Conv1d))
    with Seen(model) as seen:
        for trained, names in ((False, {"b.weight"}), (True, {"a.weight", "b.weight"})):
            model.a.requires_grad_(trained)
            seen.records.clear()
            model(x).square().sum().backward()
            assert {record.names[0] for record in seen.records} == names
