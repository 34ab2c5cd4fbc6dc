"""What the watch tells of the models of the zoo and of attention, against autograd."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from engine.watching import Seen
from steepest.errors import UnsupportedModelError
from zoo import ZOO, Entry
from zoo_parts import Net

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
        with Seen(model), pytest.raises(UnsupportedModelError, match=r"attn.*\(5, 6\).*3 samples cannot be told"):
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
