"""What a capture leaves behind, how long it holds memory, and the numerical corners of its rows."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import steepest as st
from capturing import capture_rows, check, mlp, points
from oracles import entry_truth, reduction_errors
from steepest.errors import CaptureError
from zoo import ZOO
from zoo_parts import rows_of

L = nn.Linear
World = Callable[[], dict[str, object]]
KINDS = pytest.mark.parametrize("kind", [st.Capture, st.ReferenceCapture], ids=["fast", "reference"])
BY_NAME = {entry.name: entry for entry in ZOO}


def explode(_: Tensor) -> None:
    raise ZeroDivisionError


@KINDS
@pytest.mark.parametrize("fails", [False, True], ids=["success", "exception"])
def test_nothing_is_left_behind(kind: type, fails: bool, world: World) -> None:
    model, x = mlp(), points()
    before, attributes = world(), {name: set(vars(m)) for name, m in model.named_modules()}
    capture = kind(model)
    if fails:
        with pytest.raises(ZeroDivisionError), capture:
            explode(model(x))
    else:
        with capture:
            rows = rows_of(model(x))
        capture.jacobian(rows).gram()
    assert world() == before
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    assert all(not vars(p) for p in model.parameters()), "nothing is stored on parameters"

    with capture:  # an exception does not spoil the capture
        rows = rows_of(model(x))
    check(capture.jacobian(rows), model, lambda: rows_of(model(x)))


@KINDS
def test_a_failure_inside_jacobian_leaves_nothing(kind: type, world: World) -> None:
    model, x = mlp(), points()
    before, capture = world(), kind(model)
    with capture:
        model(x)
    with pytest.raises(CaptureError):
        capture.jacobian(torch.ones(6, dtype=torch.float64))
    assert world() == before
    with capture:
        rows = rows_of(model(x))
    check(capture.jacobian(rows), model, lambda: rows_of(model(x)))


@KINDS
def test_the_model_trains_normally_afterwards(kind: type) -> None:
    model, x = mlp(), points()
    want = torch.autograd.grad(rows_of(model(x)).sum(), list(model.parameters()))
    capture = kind(model)
    with capture:
        rows = rows_of(model(x))
    capture.jacobian(rows).gram()
    rows_of(model(x)).sum().backward()
    for parameter, grad in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


class Sentinel:
    """Dies with the graph that holds it."""


class Hold(torch.autograd.Function):
    """The identity on data; its node in the graph keeps a sentinel alive."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, sentinel: Sentinel) -> Tensor:
        ctx.sentinel = sentinel
        return x.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@KINDS
def test_graph_and_model_are_freed(kind: type) -> None:
    model, x, sentinel = mlp(), points(), Sentinel()
    gone = {"graph": weakref.ref(sentinel), "model": weakref.ref(model), "layer": weakref.ref(model[0])}
    capture = kind(model)
    with capture:
        rows = rows_of(Hold.apply(model(x), sentinel))
    jac = capture.jacobian(rows)
    jac.gram()
    gone["jacobian"] = weakref.ref(jac)
    del rows, sentinel, jac
    gc.collect()
    assert gone["jacobian"]() is None
    assert gone["graph"]() is None, "the capture still holds the graph of the last batch"
    del model, capture
    gc.collect()
    assert {name: ref() for name, ref in gone.items()} == dict.fromkeys(gone)


def test_an_abandoned_capture_frees_its_graph() -> None:
    model, sentinel = mlp(), Sentinel()
    gone = weakref.ref(sentinel)
    capture = st.Capture(model)
    with capture:
        rows = rows_of(Hold.apply(model(points()), sentinel))
    del rows, sentinel
    with capture:  # the next batch replaces the one that nobody asked about
        rows = rows_of(model(points()))
    gc.collect()
    assert gone() is None
    assert capture.jacobian(rows).num_rows == 6


@KINDS
@pytest.mark.parametrize("how", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["deepcopy", "pickle"])
def test_capture_is_copied_with_its_model(kind: type, how: Callable[[object], tuple[nn.Module, st.Capture]]) -> None:
    model, x = mlp(), points()
    original = kind(model)
    twin, capture = how((model, original))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)  # the twin's own numbers, not the original's
    with capture:
        rows = rows_of(twin(x))
    check(capture.jacobian(rows), twin, lambda: rows_of(twin(x)))
    with original:
        rows = rows_of(model(x))
    check(original.jacobian(rows), model, lambda: rows_of(model(x)))


@pytest.mark.parametrize("name", ["mlp", "conv2d", "exp_log_scale", "masked_linear", "tied", "layer_norm"])
def test_jacobian_is_a_snapshot(name: str) -> None:
    """A step changes the parameters and a loader its buffers: the Jacobian stays that of the batch."""
    entry = BY_NAME[name]
    model, inputs = entry.build()
    truth = entry_truth(entry, model, inputs)
    jac = capture_rows(model, entry.closure(model, inputs))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    errors = reduction_errors(jac, truth)
    assert max(errors.values()) <= 1e-10, errors


def test_results_are_the_callers_own() -> None:
    model, x = mlp(), points()
    jac = capture_rows(model, lambda: rows_of(model(x)))
    for result in (
        jac.gram(),
        jac.to_dense(),
        *jac.per_sample_grads().values(),
        *jac.vjp(torch.ones(6)).values(),
    ):
        result.zero_()
    check(jac, model, lambda: rows_of(model(x)))


@pytest.mark.parametrize("attribute", ["num_rows", "names", "shapes"])
def test_jacobian_is_immutable(attribute: str) -> None:
    model, x = mlp(), points()
    jac = capture_rows(model, lambda: rows_of(model(x)))
    with pytest.raises(AttributeError):
        setattr(jac, attribute, None)
