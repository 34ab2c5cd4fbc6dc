"""Where the watch finds the batch, and what it cannot tell and refuses by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from capturing import mlp, points
from engine.watching import Seen
from steepest.engine.capture import named_trainable
from steepest.errors import CaptureError, UnsupportedModelError
from steepest.optim.blocks import assign
from zoo_parts import Net, two_layers

L, S = nn.Linear, nn.Sequential


def test_losses_made_of_derivatives_are_refused_by_name() -> None:
    """The second backward reaches the weights on a way that the layer's output does not see."""
    model, x = mlp(), points().requires_grad_()
    with Seen(model), pytest.raises(UnsupportedModelError, match=r"'0\.weight'|'2\.weight'") as raised:
        torch.autograd.grad(model(x).sum(), x, create_graph=True)
    assert "create_graph" in str(raised.value)
    assert "skip=" in str(raised.value)


def test_reentrant_checkpointing_is_refused_by_name() -> None:
    model = Net(lambda n, x: n.b(checkpoint(n.a, n.c(x), use_reentrant=True)), a=L(5, 5), b=L(5, 2), c=L(5, 5)).double()
    with Seen(model), pytest.raises(UnsupportedModelError, match=r"'a\.bias', 'a\.weight'.*use_reentrant=False"):
        model(points())


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


def test_a_parameter_used_besides_its_layer_is_refused_by_name() -> None:
    model = Net(lambda n, x: n.a(x) * n.a.weight.norm(), a=L(5, 5)).double()
    with Seen(model), pytest.raises(UnsupportedModelError, match=r"'a\.weight' is used in norm"):
        model(points())


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


# -- where the batch is ----------------------------------------------------------------------------


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
