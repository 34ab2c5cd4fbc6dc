"""Calls in the wrong order or with impossible arguments: one clear error, and the capture stays usable."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import steepest as st
from capturing import exact_or_refused
from steepest.errors import CaptureError, InvalidOptionError, UnsupportedModelError
from zoo import Net
from zoo_parts import rows_of

L = nn.Linear
KINDS = pytest.mark.parametrize("kind", [st.Capture, st.ReferenceCapture], ids=["fast", "reference"])


def captured_mlp(kind: type = st.Capture) -> tuple[st.Capture, Tensor]:
    model = nn.Sequential(L(5, 4), nn.Tanh(), L(4, 2))
    capture = kind(model)
    with capture:
        rows = rows_of(model(torch.randn(6, 5)))
    return capture, rows


def test_jacobian_without_with() -> None:
    model = L(5, 3)
    capture, rows = st.Capture(model), rows_of(model(torch.randn(6, 5)))
    with pytest.raises(CaptureError, match="with"):
        capture.jacobian(rows)


def test_jacobian_twice() -> None:
    capture, rows = captured_mlp()
    capture.jacobian(rows)
    with pytest.raises(CaptureError, match=r"(?i)already|twice|again|with"):
        capture.jacobian(rows)


def test_losses_of_an_uncaptured_forward() -> None:
    model, x = nn.Sequential(L(5, 4), L(4, 2)), torch.randn(6, 5)
    rows = rows_of(model(x))
    capture = st.Capture(model)
    with capture:
        model(x)
    with pytest.raises((CaptureError, UnsupportedModelError), match=r"(?i)param|outside|with"):
        capture.jacobian(rows)


def test_losses_partly_outside() -> None:
    """One layer ran before the with block: its gradient would be silently lost."""
    model, x = Net(lambda n, x: x, a=L(5, 4), b=L(4, 2)), torch.randn(6, 5)
    h = model.a(x)
    capture = st.Capture(model)
    with capture:
        rows = rows_of(model.b(h))
    with pytest.raises((CaptureError, UnsupportedModelError), match=r"a\.(weight|bias)"):
        capture.jacobian(rows)


CHANGES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "interacting": lambda model, x: (r := rows_of(model(x))) - r.mean(),
    "flipped": lambda model, x: rows_of(model(x)).flip(0),
    "transposed": lambda model, x: rows_of(model(x).transpose(0, 1)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_closure_of_the_same_shape(name: str) -> None:
    """What the first batch showed about the rows may not be believed of a closure that differs."""
    model, x = nn.Sequential(L(5, 4), nn.Tanh(), L(4, 2)).double(), torch.randn(4, 4, 5, dtype=torch.float64)
    capture = st.Capture(model)
    for closure in (lambda: rows_of(model(x)), lambda: CHANGES[name](model, x)):
        exact_or_refused(capture, model, closure)


def mixed_with_a_coefficient(h: Tensor, key: Tensor, late: bool) -> Tensor:
    return h - (0.7 if late else 0.0) * h.mean(0)


def sorted_by_a_key(h: Tensor, key: Tensor, late: bool) -> Tensor:
    """Batches come sorted already, until one does not."""
    return h[(-key if late else key).argsort()]


@pytest.mark.parametrize("change", [mixed_with_a_coefficient, sorted_by_a_key])
def test_interaction_that_begins_later(change: Callable[[Tensor, Tensor, bool], Tensor]) -> None:
    """It shows in no graph, only in numbers: found by the next probe, at once if every batch is probed."""
    model = nn.Sequential(L(5, 4), nn.Tanh(), L(4, 2)).double()
    capture = st.Capture(model, probe_every=1)
    x = torch.randn(4, 5, dtype=torch.float64)
    x = x[x[:, 0].argsort()]
    for late in (False, False, False, False, True):
        closure = partial(lambda late: rows_of(model[2](change(model[0](x), x[:, 0], late))), late)
        refusal = exact_or_refused(capture, model, closure)
        assert late == bool(refusal)


def test_the_probe_returns_at_powers_of_two_and_at_its_period() -> None:
    model = L(5, 3)
    capture = st.Capture(model, probe_every=6)
    probed = []
    for batch in range(1, 19):
        before = capture._finder.probes
        with capture:
            rows = rows_of(model(torch.randn(4, 5)))
        capture.jacobian(rows)
        if capture._finder.probes > before:
            probed.append(batch)
    assert probed == [1, 2, 4, 6, 8, 12, 16, 18]


@pytest.mark.parametrize("same", [True, False], ids=["same_capture", "two_captures"])
def test_nested_captures(same: bool) -> None:
    model = L(5, 3)
    outer = st.Capture(model)
    inner = outer if same else st.Capture(model)
    with pytest.raises(CaptureError, match=r"(?i)nest|inside|already|another"), outer, inner:
        model(torch.randn(6, 5))
    with inner:
        rows = rows_of(model(torch.randn(6, 5)))
    assert inner.jacobian(rows).num_rows == 6


@pytest.mark.parametrize(
    "blocks",
    [
        {},
        {"a": torch.tensor(1.0, requires_grad=True) * 1},
        {"a": torch.ones(3)},
    ],
    ids=["empty", "scalar_block", "constant_block"],
)
def test_bad_blocks(blocks: dict[str, Tensor]) -> None:
    capture, _ = captured_mlp()
    with pytest.raises(CaptureError, match=r"(?i)block|row|'a'"):
        capture.jacobian(blocks)


@pytest.mark.parametrize("max_memory", [0, -5])
def test_impossible_memory(max_memory: int) -> None:
    with pytest.raises(InvalidOptionError, match="max_memory"):
        st.Capture(L(2, 2), max_memory=max_memory)


@KINDS
def test_wrong_arguments_of_reductions(kind: type) -> None:
    capture, rows = captured_mlp(kind)
    jac = capture.jacobian(rows)
    with pytest.raises((CaptureError, ValueError), match=r"(?i)6"):
        jac.vjp(torch.ones(5))
    with pytest.raises((CaptureError, ValueError, KeyError), match=r"(?i)nosuch|0.weight"):
        jac.jvp({"nosuch": torch.ones(2)})
    with pytest.raises((CaptureError, ValueError), match="precision"):
        jac.gram(precision="float16")
