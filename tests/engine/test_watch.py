"""What the watch tells of an ordinary training loop, against autograd on the same loop."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from steepest.engine.capture import named_trainable
from steepest.engine.records import Record
from steepest.engine.watch import Pass, Watch
from steepest.errors import CaptureError, UnsupportedModelError
from steepest.optim.blocks import assign
from zoo import ZOO, Entry
from zoo_parts import Net, two_layers

L, S = nn.Linear, nn.Sequential


class Seen:
    """A watch of all layers with factors, and all that it was told."""

    def __init__(self, model: nn.Module, *, exact: bool = True, due: Callable[[], bool] = lambda: True) -> None:
        blocks = assign(model, named_trainable(model, None), ()).blocks
        self.params = {n: p for block in blocks for n, p in zip(block.names, block.params, strict=True)}
        self.forwards: list[int] = []
        self.records: list[Record] = []
        self.watch = Watch(
            model, self.params, is_due=due, exact_rows=exact, on_forward=self._forward, on_gradient=self._gradient
        )

    def _forward(self, seen: Pass) -> int:
        self.forwards.append(seen.rows)
        return len(self.forwards)

    def _gradient(self, note: int, record: Record) -> None:
        assert note <= len(self.forwards)
        self.records.append(record)

    def __enter__(self) -> Seen:
        return self

    def __exit__(self, *_: object) -> None:
        self.watch.close()

    def sums(self, take: Callable[[int], slice] | None = None) -> dict[str, Tensor]:
        """Gradients by name, of all rows or of some."""
        total: dict[str, Tensor] = {}
        for record in self.records:
            part = record if take is None else record.take(take(record.num_rows))
            for name, grad in zip(record.names, part.summed(), strict=True):
                total[name] = total[name] + grad if name in total else grad
        return total

    def check(self, tolerance: float = 1e-10) -> None:
        """What was seen adds up to p.grad."""
        sums = self.sums()
        assert sums.keys() == {name for name, p in self.params.items() if p.grad is not None}
        for name, grad in sums.items():
            torch.testing.assert_close(grad, self.params[name].grad.to(grad), rtol=tolerance, atol=tolerance)


def mlp() -> nn.Module:
    return S(L(5, 6), nn.Tanh(), L(6, 3)).double()


def points(rows: int = 6) -> Tensor:
    return torch.randn(rows, 5, dtype=torch.float64)


# The zoo's rows that the watch need not explain: a penalty outside of the forward, and two forwards of unequal size.
OUTSIDE = {"regularised", "two_blocks"}
REFUSED = {"child_weight": "besides its layer", "decoder_layer": "besides its layer"}


def rows_or_refusal(entry: Entry, model: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor | None, str]:
    try:
        rows = entry.losses(model, batch)
    except UnsupportedModelError as error:
        return None, str(error)
    assert isinstance(rows, Tensor)
    return rows, ""


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("entry", [e for e in ZOO if e.name not in OUTSIDE], ids=lambda entry: entry.name)
def test_an_ordinary_backward_is_seen_whole_and_by_halves_or_refused_by_name(entry: Entry) -> None:
    model, batch = entry.build()
    with Seen(model) as seen:
        rows, refusal = rows_or_refusal(entry, model, batch)
        if rows is None:
            assert REFUSED.get(entry.name, "cannot be told") in refusal
            assert any(repr(name) in refusal for name in seen.params)
            return
        half = len(rows) // 2
        params = list(seen.params.values())
        first = (
            torch.autograd.grad(rows[:half].sum(), params, retain_graph=True, materialize_grads=True) if params else ()
        )
        seen.records.clear()
        rows.sum().backward()
        seen.check()
        halves = seen.sums(lambda n: slice(0, n // 2))
        rest = seen.sums(lambda n: slice(n // 2, None))
        for (name, param), wanted in zip(seen.params.items(), first, strict=True):
            if name in halves:
                torch.testing.assert_close(halves[name], wanted, rtol=1e-10, atol=1e-10)
                torch.testing.assert_close(rest[name], param.grad - wanted, rtol=1e-9, atol=1e-9)
            else:
                assert param.grad is None


def test_most_of_the_zoo_is_seen_and_not_refused() -> None:
    """The refusals above are those of batches as long as the sequence, and no way out for all others."""
    refused = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for entry in ZOO:
            model, batch = entry.build()
            with Seen(model, exact=False):
                try:
                    entry.losses(model, batch)
                except UnsupportedModelError:
                    refused.append(entry.name)
    assert refused == ["child_weight", "decoder_layer"]


@pytest.mark.parametrize("exact", [False, True])
def test_attention_over_other_than_the_batch(exact: bool) -> None:
    """Sequences folded into the batch: their sums are right, single samples are refused."""
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    model = Net(lambda n, x: n.attn(*[x.flatten(0, 1)] * 3, need_weights=False)[0].mean(1), attn=attention).double()
    x = torch.randn(3, 2, 5, 4, dtype=torch.float64)
    if exact:
        with Seen(model), pytest.raises(UnsupportedModelError, match=r"attn.*6 sequences.*batch is 3"):
            model(x)
        return
    with Seen(model, exact=False) as seen:
        model(x).square().sum().backward()
        seen.check()


def test_sequence_first_attention_is_told_apart_where_the_lengths_are_equal() -> None:
    model = nn.MultiheadAttention(4, 2, batch_first=True).double()
    x = torch.randn(4, 4, 4, dtype=torch.float64)
    with Seen(model) as seen:
        rows = model(x, x, x)[0].square().sum((1, 2))
        first = torch.autograd.grad(rows[:2].sum(), list(seen.params.values()), retain_graph=True)
        seen.records.clear()
        rows.sum().backward()
        halves = seen.sums(lambda n: slice(0, 2))
        for name, wanted in zip(seen.params, first, strict=True):
            torch.testing.assert_close(halves[name], wanted)


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


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = L(5, 6), L(6, 3)
        self.error: type[BaseException] | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        if self.error is not None:
            raise self.error("on the way")
        return self.b(h)


def test_a_forward_that_raises_leaves_nothing_behind(world: Callable[[], dict[str, object]]) -> None:
    model = Fails().double()
    with Seen(model) as seen:
        before = world()
        model.error = ValueError
        with pytest.raises(ValueError, match="on the way"):
            model(points(2))
        assert world() == before
        model.error = None
        model(points()).square().sum().backward()
        seen.check()
        assert seen.forwards == [6]


@pytest.mark.parametrize("remedy", ["abandon", "close", "collect"])
def test_an_interrupted_forward_is_left(world: Callable[[], dict[str, object]], remedy: str) -> None:
    """Torch does not run the hooks after Ctrl-C: the mode stays until something of the optimizer is called."""
    model = Fails().double()
    modes = world()["function modes"]
    seen = Seen(model)
    model.error = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        model(points(2))
    assert world()["function modes"] != modes
    if remedy == "abandon":
        seen.watch.abandon()
        model.error = None
        model(points()).square().sum().backward()
        seen.check()
        seen.watch.close()
    elif remedy == "close":
        seen.watch.close()
    else:
        del seen
        gc.collect()
    assert world()["function modes"] == modes


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


def test_losses_made_of_derivatives_are_refused_by_name() -> None:
    """The second backward reaches the weights on a way that the layer's output does not see."""
    model, x = mlp(), points().requires_grad_()
    with Seen(model), pytest.raises(UnsupportedModelError, match=r"'0\.weight'|'2\.weight'") as raised:
        torch.autograd.grad(model(x).sum(), x, create_graph=True)
    assert "create_graph" in str(raised.value)
    assert "skip=" in str(raised.value)


# -- checkpoints, autocast, edits ------------------------------------------------------------------


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


def test_reentrant_checkpointing_is_refused_by_name() -> None:
    model = Net(lambda n, x: n.b(checkpoint(n.a, n.c(x), use_reentrant=True)), a=L(5, 5), b=L(5, 2), c=L(5, 5)).double()
    with Seen(model), pytest.raises(UnsupportedModelError, match=r"'a\.bias', 'a\.weight'.*use_reentrant=False"):
        model(points())


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


def test_an_input_edited_after_its_layer_is_told() -> None:
    def run(net: Net, x: Tensor) -> Tensor:
        h = x.tanh()
        z = net.a(h)
        with torch.no_grad():
            h.data = h.data  # a view of its own: the version counter does not move
            h.mul_(2)
        return z

    model = Net(run, a=L(5, 3)).double()
    with Seen(model), pytest.raises(RuntimeError, match=r"in-?place"):
        model(points()).sum().backward()


# -- what cannot be told ---------------------------------------------------------------------------


def test_a_parameter_used_besides_its_layer_is_refused_by_name() -> None:
    model = Net(lambda n, x: n.a(x) * n.a.weight.norm(), a=L(5, 5)).double()
    with Seen(model), pytest.raises(UnsupportedModelError, match=r"'a\.weight' is used in norm"):
        model(points())


def test_an_ambiguous_batch_dimension_is_refused_by_name_where_it_matters() -> None:
    model, x = S(L(5, 4)).double(), torch.randn(3, 3, 5, dtype=torch.float64)
    with Seen(model), pytest.raises(UnsupportedModelError, match=r"'0\.weight'.*\(3, 3\).*cannot be told"):
        model(x)
    with Seen(model, exact=False) as seen:
        model(x).square().sum().backward()
        seen.check()
    model.zero_grad()
    with Seen(model) as seen:  # one sample is no riddle
        model(x[:1, :1]).square().sum().backward()
        seen.check()


def test_an_output_without_the_batch_is_refused_by_name() -> None:
    model = Net(lambda n, x: n.a(x.mean(0, keepdim=True)), a=L(5, 3)).double()
    with Seen(model), pytest.raises(UnsupportedModelError, match=r"'a\.weight'.*batch of 6 is none of them"):
        model(points())


def test_an_input_without_a_batch_dimension_is_refused_by_name() -> None:
    model = mlp()
    with Seen(model), pytest.raises(UnsupportedModelError, match="batch"):
        model(points(1)[0])


def test_a_model_called_without_a_tensor_is_refused() -> None:
    model = Net(lambda n, *_: n.a(torch.ones(2, 5)), a=L(5, 3))
    with Seen(model), pytest.raises(CaptureError, match="without a tensor"):
        model(3)


@pytest.mark.parametrize("given", [lambda x: {"x": x}, lambda x: [x], lambda x: (None, x), lambda x: {"x": [x, 1]}])
def test_the_batch_is_found_in_nested_inputs(given: Callable[[Tensor], Any]) -> None:
    def run(net: Net, packed: Any) -> Tensor:
        inner = packed["x"] if isinstance(packed, dict) else packed
        items = inner if isinstance(inner, (list, tuple)) else [inner]
        return net.a(next(item for item in items if isinstance(item, Tensor)))

    model = Net(run, a=L(5, 3)).double()
    with Seen(model) as seen:
        model(given(points(4))).sum().backward()
        assert seen.forwards == [4]
        seen.check()


def test_keyword_inputs_count_too() -> None:
    model = two_layers().double()
    model.forward = lambda x: model.run(model, x)  # type: ignore[method-assign]
    with Seen(model) as seen:
        model(x=points(4)).sum().backward()
        assert seen.forwards == [4]


# -- lifetime --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_a_watched_model_is_not_watched_and_trains(how: str) -> None:
    model = mlp()
    with Seen(model) as seen:
        other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
        x = points()
        other(x).square().sum().backward()
        assert seen.forwards == []
        model(x).square().sum().backward()
        seen.check()
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)
            assert a.grad is not b.grad


@pytest.mark.parametrize("how", ["close", "collect"])
def test_no_hook_is_left(how: str, world: Callable[[], dict[str, object]]) -> None:
    model = mlp()
    seen = Seen(model)
    model(points()).square().sum().backward()
    assert world()["hooks"]
    if how == "close":
        seen.watch.close()
        assert seen.watch.is_closed
        seen.watch.close()  # a second time is nothing
    else:
        del seen
        gc.collect()
    assert world()["hooks"] == []
    model(points()).sum().backward()


def test_a_graph_that_is_not_walked_is_freed_without_the_collector() -> None:
    model = mlp()
    kept: list[weakref.ref[Tensor]] = []
    model[0].register_forward_hook(lambda _m, _i, out: kept.append(weakref.ref(out)))
    with Seen(model) as seen:
        gc.disable()
        try:
            for walked in (True, False, True):
                loss = model(points()).square().sum()
                if walked:
                    loss.backward()
                del loss
                seen.records.clear()
                assert [ref() for ref in kept] == [None] * len(kept)
        finally:
            gc.enable()
    assert len(kept) == 3
    model[0]._forward_hooks.clear()


def test_nothing_grows_over_fifty_steps() -> None:
    model = mlp()

    def tensors() -> int:
        return sum(type(item) in {Tensor, nn.Parameter} for item in gc.get_objects())

    with Seen(model) as seen:
        gc.collect()
        counts = []
        gc.disable()
        try:
            for step in range(50):
                model.zero_grad()
                model(points()).square().sum().backward()
                seen.records.clear()
                if step in {1, 49}:
                    counts.append(tensors())
        finally:
            gc.enable()
    assert counts[1] <= counts[0]


# -- compiled models -------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["whole", "layer", "in_place"])
def test_compiled_models_are_refused_by_name(part: str) -> None:
    model = mlp()
    if part == "whole":
        model = torch.compile(model, backend="eager")
    elif part == "layer":
        model[0] = torch.compile(model[0], backend="eager")
    else:
        model[0].compile(backend="eager")
    with pytest.raises(UnsupportedModelError, match=r"^0 is compiled|^The model is compiled"):
        assign(model, named_trainable(model, None), ())
