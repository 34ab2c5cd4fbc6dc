"""Every reduction over the zoo: the fast engine and the reference against truths that know neither."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

import steepest as st
from oracles import REDUCTIONS, Grads, entry_truth, reduction_errors, stack_rows, trainable
from steepest.errors import CaptureError, UnsupportedModelError
from zoo import ZOO, Batch, Entry, Rows

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
ENTRIES = pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)


@dataclass(frozen=True)
class Case:
    """One capture of one entry and what it should have given."""

    jac: st.Jacobian
    truth: Grads


def captured(entry: Entry, model: nn.Module, batch: Batch, kind: type = st.Capture) -> tuple[st.Jacobian, Rows]:
    """Capture one closure call; a refusal is accepted only where the entry says so."""
    try:
        capture = kind(model)
        with capture:
            rows = entry.losses(model, batch)
        return capture.jacobian(rows), rows
    except (UnsupportedModelError, CaptureError) as error:
        if entry.expect == "safe":
            pytest.skip(f"refused by name, as it may be: {error}")
        raise


@lru_cache(maxsize=4)  # the tests of one entry run one after the other
def case(entry: Entry, dtype: torch.dtype, kind: type = st.Capture) -> Case:
    model, batch = entry.build(dtype)
    return Case(captured(entry, model, batch, kind)[0], entry_truth(entry, model, batch))


@pytest.fixture(scope="module", autouse=True)
def _free_cases() -> Iterator[None]:
    yield
    case.cache_clear()


@pytest.mark.parametrize("reduction", REDUCTIONS)  # varies fastest: one capture serves all
@DTYPES
@ENTRIES
def test_reduction_equals_the_oracle(entry: Entry, dtype: torch.dtype, reduction: str) -> None:
    it = case(entry, dtype)
    # a Gram asked for in float32 is as exact as float32 products are, whatever the model's dtype
    tolerance = TOLERANCE[torch.float32 if reduction == "gram32" else dtype]
    assert REDUCTIONS[reduction](it.jac, it.truth) <= tolerance


@ENTRIES
def test_reference_equals_the_oracle(entry: Entry) -> None:
    it = case(entry, torch.float64, st.ReferenceCapture)
    errors = reduction_errors(it.jac, it.truth)
    assert max(errors.values()) <= TOLERANCE[torch.float64], errors


@ENTRIES
def test_a_single_sample_is_its_own_gradient(entry: Entry) -> None:
    """R = 1 leaves the layout to no comparison of rows."""
    model, batch = entry.build()
    batch = tuple(t[:1] for t in batch)
    errors = reduction_errors(captured(entry, model, batch)[0], entry_truth(entry, model, batch))
    assert max(errors.values()) <= TOLERANCE[torch.float64], errors


@ENTRIES
def test_names_shapes_and_dtypes(entry: Entry) -> None:
    model, batch = entry.build(torch.float32)
    jac, rows = captured(entry, model, batch)
    parameters = trainable(model)
    assert jac.names == tuple(parameters)
    assert dict(jac.shapes) == {name: p.shape for name, p in parameters.items()}
    assert jac.num_rows == len(stack_rows(rows))
    assert jac.gram().dtype == jac.gram(precision="float64").dtype == torch.float64
    assert jac.gram(precision="float32").dtype == torch.float32
    assert jac.to_dense(dtype=torch.float64).dtype == torch.float64
    for grads in (jac.per_sample_grads(), jac.vjp(torch.ones(jac.num_rows))):
        assert list(grads) == list(parameters)
        assert all(g.dtype == torch.float32 and not g.requires_grad for g in grads.values())


@ENTRIES
def test_gram_is_symmetric(entry: Entry) -> None:
    gram = case(entry, torch.float64).jac.gram()
    torch.testing.assert_close(gram, gram.T, rtol=0, atol=1e-13 * gram.abs().max().item())


@ENTRIES
@DTYPES
def test_capture_is_invisible(entry: Entry, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same losses, same random numbers, one forward; no gradient and no flag changed."""
    model, batch = entry.build(dtype)
    calls = 0
    forward = model.forward

    def counted(*inputs: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return forward(*inputs)

    monkeypatch.setattr(model, "forward", counted)
    torch.manual_seed(11)
    plain = stack_rows(entry.losses(model, batch)).detach()
    state, calls_of_closure, calls = torch.get_rng_state(), calls, 0
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    values = {name: t.clone() for name, t in model.state_dict().items()}
    inputs = [t.clone() for t in batch]

    torch.manual_seed(11)
    jac, rows = captured(entry, model, batch)
    for _ in range(2):  # asking again costs no second forward either
        jac.gram()
        jac.vjp(torch.ones(jac.num_rows))
        jac.jvp({name: torch.zeros_like(p) for name, p in trainable(model).items()})
        jac.per_sample_grads()

    assert torch.equal(stack_rows(rows).detach(), plain)
    assert torch.equal(torch.get_rng_state(), state)
    assert calls == calls_of_closure
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(t, values[name]) for name, t in model.state_dict().items())
    assert all(torch.equal(t, before) and t.grad is None for t, before in zip(batch, inputs, strict=True))


@ENTRIES
def test_a_capture_is_reused_batch_after_batch(entry: Entry) -> None:
    model, first = entry.build()
    _, second = entry.build(seed=7)
    try:
        capture = st.Capture(model)
        for batch in (first, second, first):
            with capture:
                rows = entry.losses(model, batch)
            errors = reduction_errors(capture.jacobian(rows), entry_truth(entry, model, batch))
            assert max(errors.values()) <= TOLERANCE[torch.float64], errors
    except (UnsupportedModelError, CaptureError):
        if entry.expect == "exact":
            raise


@pytest.mark.parametrize("kind", [st.Capture, st.ReferenceCapture], ids=["fast", "reference"])
def test_params_narrow_the_jacobian(kind: type) -> None:
    entry = next(e for e in ZOO if e.name == "mlp")
    model, batch = entry.build()
    chosen = [model[2].weight, model[0].bias]
    capture = kind(model, params=chosen)
    with capture:
        rows = entry.losses(model, batch)
    jac = capture.jacobian(rows)
    truth = entry_truth(entry, model, batch)
    assert set(jac.names) == {"2.weight", "0.bias"}
    errors = reduction_errors(jac, {name: truth[name] for name in jac.names})
    assert max(errors.values()) <= TOLERANCE[torch.float64], errors


@pytest.mark.parametrize("name", ["mlp", "conv2d", "embedding", "layer_norm"])
def test_reductions_need_no_second_backward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = next(e for e in ZOO if e.name == name)
    model, batch = entry.build()
    jac, rows = captured(entry, model, batch)
    jac.gram()

    def forbidden(*_: object, **__: object) -> None:
        pytest.fail("a reduction ran autograd again")

    monkeypatch.setattr(torch.autograd, "grad", forbidden)
    monkeypatch.setattr(torch.autograd, "backward", forbidden)
    jac.vjp(torch.ones(jac.num_rows))
    jac.jvp({n: torch.zeros_like(p) for n, p in trainable(model).items()})
    jac.per_sample_grads()
    jac.gram()
    assert stack_rows(rows).shape == (jac.num_rows,)


def test_a_gram_of_many_rows_is_formed_by_halves_and_whole() -> None:
    """From 128 rows on, products are formed above the diagonal only: of a record as a whole, and piece by piece."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40), nn.Tanh(), nn.Flatten(), nn.Linear(320, 900), nn.Tanh()).double()
    capture = st.Capture(model)
    x = torch.randn(131, 8, 40, dtype=torch.float64)
    with capture:
        rows = model(x).square().sum(1)
    jac = capture.jacobian(rows)
    gram, dense = jac.gram(), jac.to_dense()
    torch.testing.assert_close(gram, dense @ dense.T, rtol=0, atol=1e-12 * float(gram.max()))
