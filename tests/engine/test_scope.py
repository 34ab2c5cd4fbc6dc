"""The last layer by execution, whatever the model's definition says."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

import steepest as st
from steepest.engine import last_layer
from zoo_parts import Net

L, S = nn.Linear, nn.Sequential


def tied() -> nn.Module:
    net = Net(lambda n, x: n.head(n.body(n.table(x.long().abs() % 4)).tanh()), table=nn.Embedding(4, 5), body=L(5, 5),
              head=L(5, 4))  # fmt: skip
    net.head.weight = net.table.weight
    return net


def recurrent() -> nn.Module:
    return Net(lambda n, x: n.head(n.rnn(x.unsqueeze(1))[0][:, -1]), rnn=nn.LSTM(5, 4), head=L(4, 2))


def frozen_head() -> nn.Module:
    model = S(L(5, 6), nn.Tanh(), L(6, 2))
    model[2].weight.requires_grad_(False)
    return model


def without_bias() -> nn.Module:
    model = S(L(5, 6), nn.Tanh(), L(6, 2))
    model[2].bias.requires_grad_(False)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "one layer": (lambda: L(5, 3), ("weight", "bias")),
    "log-softmax after it": (lambda: S(L(5, 6), nn.ReLU(), L(6, 3), nn.LogSoftmax(1)), ("2.weight", "2.bias")),
    "a norm after it": (lambda: S(L(5, 6), L(6, 4), nn.LayerNorm(4), nn.BatchNorm1d(4)), ("1.weight", "1.bias")),
    "head defined first": (lambda: Net(lambda n, x: n.head(n.trunk(x)), head=L(6, 2), trunk=L(5, 6)),
                           ("head.weight", "head.bias")),
    "tied": (tied, ("table.weight", "head.bias")),
    "called through F": (lambda: Net(lambda n, x: F.linear(n.a(x), n.b.weight), a=L(5, 5), b=L(5, 5)), ("b.weight",)),
    "data @ parameter": (lambda: Net(lambda n, x: n.a(x) @ n.b.weight, a=L(5, 5), b=L(5, 5)), ("b.weight",)),
    "convolution": (lambda: Net(lambda n, x: n.c(n.a(x).unsqueeze(1)).mean((1, 2)), c=nn.Conv1d(1, 2, 3), a=L(5, 5)),
                    ("c.weight", "c.bias")),
    "parametrized": (lambda: S(L(5, 4), parametrizations.weight_norm(L(4, 3))),
                     ("1.parametrizations.weight.original0", "1.parametrizations.weight.original1", "1.bias")),
    "frozen head": (frozen_head, ("0.weight", "0.bias")),
    "frozen bias": (without_bias, ("2.weight",)),
    "recurrent trunk": (recurrent, ("head.weight", "head.bias")),
    "attention": (lambda: Net(lambda n, x: n.att(*[x.unsqueeze(1)] * 3)[0], att=nn.MultiheadAttention(5, 1)),
                  ("att.out_proj.weight", "att.out_proj.bias")),
    "bare matrix last": (lambda: Net(lambda n, x: n.a(x) + n.grid[:1], a=L(5, 5), grid=nn.Parameter(torch.ones(2, 5))),
                         ("a.weight", "a.bias")),
    "called twice": (lambda: Net(lambda n, x: n.a(n.b(n.a(x))), a=L(5, 5), b=L(5, 5)), ("a.weight", "a.bias")),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_the_last_layer_is_the_last_that_ran(name: str) -> None:
    make, expected = MODELS[name]
    model = make().eval()
    x = torch.randn(4, 5)
    assert last_layer(model, lambda: model(x)) == expected


def test_gradients_switched_off_by_the_caller_do_not_matter() -> None:
    model, x = S(L(5, 3), nn.Tanh()), torch.randn(4, 5)
    with torch.no_grad():
        assert last_layer(model, lambda: model(x)) == ("0.weight", "0.bias")


def test_functional_calls_with_the_models_own_tensors_are_seen() -> None:
    model, x = S(L(5, 3), nn.Tanh(), L(3, 2)), torch.randn(4, 5)
    assert last_layer(model, lambda: functional_call(model, dict(model.named_parameters()), (x,))) == (
        "2.weight",
        "2.bias",
    )


def test_gradients_taken_inside_the_call_do_not_matter() -> None:
    """An energy's forces: a refusal of the capture is none of this function."""
    model, x = S(L(5, 3), nn.Tanh(), L(3, 1)), torch.randn(4, 5, requires_grad=True)
    assert last_layer(model, lambda: torch.autograd.grad(model(x).sum(), x))[0] == "2.weight"


def test_looking_leaves_the_model_as_it_was() -> None:
    model, x = S(L(5, 3), nn.BatchNorm1d(3), L(3, 2)).eval(), torch.randn(4, 5)
    before, outputs = copy.deepcopy(model.state_dict()), []

    def run() -> Tensor:
        outputs.append(model(x))
        return outputs[-1]

    last_layer(model, run)
    assert len(outputs) == 1
    assert torch.equal(outputs[0], model(x))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "model", [S(nn.LayerNorm(5)), nn.LSTM(5, 3), nn.BatchNorm1d(5).eval()], ids=["norm", "lstm", "batch norm"]
)
def test_a_model_without_a_layer_is_told_to_name_modules(model: nn.Module) -> None:
    with pytest.raises(st.UnsupportedModelError, match="Name the modules"):
        last_layer(model, lambda: model(torch.randn(4, 5)))


def test_errors_of_the_call_come_through() -> None:
    model = L(5, 3)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        last_layer(model, lambda: model(torch.randn(4, 6)))
    assert last_layer(model, lambda: model(torch.randn(4, 5))) == ("weight", "bias")
