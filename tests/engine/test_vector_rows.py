"""Vector rows, K to a sample: every reduction against autograd row by row, and nothing misread in silence."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import steepest as st
from capturing import capture_rows, exact_or_refused, mlp, points
from oracles import dense, jacobian, reduction_errors, trainable
from steepest.engine.packing import RecordForm
from steepest.engine.vector import LinearVectorRecord
from steepest.engine.vector_conv import ConvVectorRecord
from steepest.errors import CaptureError, UnsupportedModelError
from zoo import ZOO, Batch, Entry, Net
from zoo_parts import rows_of

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

L = nn.Linear
# The others return named blocks, or nothing with one row of outputs for each sample.
VECTORS = [entry for entry in ZOO if entry.name != "two_blocks"]
ENTRIES = pytest.mark.parametrize("entry", VECTORS, ids=lambda entry: entry.name)


def vectors(model: nn.Module, batch: Batch) -> Tensor:
    """Seven rows of a sample at most, made of its outputs, with one term that mixes them."""
    torch.manual_seed(3)  # dropout
    flat = model(*batch).flatten(1)[:, :7]
    return torch.tanh(flat - 0.2) * flat + 0.1 * flat.sum(1, keepdim=True).sin()


def close(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * max(1.0, float(want.abs().max()))


@lru_cache(maxsize=2)
def case(entry: Entry, kind: type = st.Capture) -> tuple[Any, dict[str, Tensor]]:
    model, batch = entry.build()
    try:
        jac = capture_rows(kind(model), lambda: vectors(model, batch))
    except (UnsupportedModelError, CaptureError) as error:
        if entry.expect == "safe":
            pytest.skip(f"refused by name, as it may be: {error}")
        raise
    return jac, jacobian(lambda: vectors(model, batch).flatten(), trainable(model))


@ENTRIES
def test_every_reduction_equals_the_oracle(entry: Entry) -> None:
    jac, truth = case(entry)
    errors = reduction_errors(jac, truth)
    assert max(errors.values()) <= 1e-10, errors


@ENTRIES
def test_what_is_made_of_the_reductions_equals_the_oracle(entry: Entry) -> None:
    jac, truth = case(entry)
    J, R = dense(truth), jac.num_rows
    weights = torch.linspace(-1, 2, R, dtype=torch.float64)
    close(jac.squared_norms(), J.square().sum(1))
    matrix, projected = jac.normal_equations(weights, torch.float64)
    close(matrix, J.T @ J)
    close(projected, J.T @ weights)
    for count in (1, 2, 40):  # more vectors than features takes another way
        made = {n: torch.randn(count, *s, dtype=torch.float64) for n, s in jac.shapes.items()}
        close(jac.project(made), J @ torch.cat([v.reshape(count, -1) for v in made.values()], 1).T)
    targets = {n: torch.ones(s, dtype=torch.float64) for n, s in jac.shapes.items()}
    jac.add_vjp_(targets, weights, dict.fromkeys(targets, -2.0))
    close(torch.cat([t.flatten() for t in targets.values()]), 1 - 2 * J.T @ weights)
    index = jac.sample_outputs(0.5, torch.Generator().manual_seed(1))
    kept = {n: g.index_select(1, index[n]) if n in index and g.ndim > 1 else g for n, g in truth.items()}
    errors = reduction_errors(jac.restrict(index), kept)
    assert max(errors.values()) <= 1e-10, errors


@ENTRIES
def test_reference_and_fast_engine_agree_on_rows_and_their_order(entry: Entry) -> None:
    slow = case(entry, st.ReferenceCapture)[0]
    fast = case(entry)[0]
    close(fast.to_dense(), slow.to_dense())
    close(fast.cross_gram(slow), slow.gram())
    close(slow.cross_gram(fast), slow.gram())


@pytest.mark.parametrize("rows", [1, 2])
@ENTRIES
def test_a_single_sample_has_all_rows(entry: Entry, rows: int) -> None:
    """B = 1 leaves the layout to no comparison of samples."""
    model, batch = entry.build()
    batch = tuple(t[:1] for t in batch)
    try:
        jac = capture_rows(model, lambda: vectors(model, batch)[:, :rows])
    except (UnsupportedModelError, CaptureError):
        if entry.expect == "exact":
            raise
        return
    errors = reduction_errors(jac, jacobian(lambda: vectors(model, batch)[:, :rows].flatten(), trainable(model)))
    assert max(errors.values()) <= 1e-10, errors


def test_inputs_are_kept_once_and_gradients_for_every_row() -> None:
    model = nn.Sequential(L(5, 6), nn.Tanh(), nn.Unflatten(1, (2, 1, 3)), nn.Conv2d(2, 4, (1, 2)), nn.Flatten())
    model, x = model.double(), points(6)
    records = capture_rows(model, lambda: vectors(model, (x,))).records
    linear, conv = records
    assert isinstance(linear, LinearVectorRecord)
    assert isinstance(conv, ConvVectorRecord)
    assert [tuple(t.shape) for t in linear.parts()[1]] == [(6, 1, 5), (6, 7, 1, 6)]
    assert [tuple(t.shape) for t in conv.parts()[1]] == [(6, 2, 1, 3), (6, 7, 4, 1, 2)]


def test_one_column_is_the_row_of_every_sample() -> None:
    """K = 1 is the scalar engine itself: the same records, bit for bit, and no batched backward."""
    model, x = mlp(), points()
    scalar = capture_rows(model, lambda: rows_of(model(x)))
    capture = st.Capture(model)
    column = capture_rows(capture, lambda: rows_of(model(x)).unsqueeze(1))
    assert [type(r) for r in column.records] == [type(r) for r in scalar.records]
    assert torch.equal(column.gram(), scalar.gram())
    assert not capture._components._batched


# Forms


@pytest.mark.parametrize("cheaper", [True, False], ids=["factorized", "explicit"])
@pytest.mark.parametrize("max_memory", [1, 3000, 1 << 28])
@pytest.mark.parametrize(
    "name", ["linear_3d", "linear_no_bias", "called_twice", "conv2d", "conv1d", "conv_frames", "conv_twice", "frozen"]
)
def test_both_forms_of_the_products_in_any_memory(
    name: str, max_memory: int, cheaper: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for room in ("vector", "vector_conv"):
        monkeypatch.setattr(f"steepest.engine.{room}.vector_is_cheaper_factorized", lambda *_: cheaper)
    entry = next(e for e in ZOO if e.name == name)
    model, batch = entry.build()
    jac = capture_rows(st.Capture(model, max_memory=max_memory), lambda: vectors(model, batch))
    J = dense(jacobian(lambda: vectors(model, batch).flatten(), trainable(model)))
    close(jac.gram(), J @ J.T)
    close(jac.cross_gram(jac), J @ J.T)
    close(jac.squared_norms(), J.square().sum(1))
    vector = {n: torch.randn(3, *s, dtype=torch.float64) for n, s in jac.shapes.items()}
    close(jac.project(vector), J @ torch.cat([v.flatten(1) for v in vector.values()], 1).T)


@pytest.mark.parametrize("name", ["mlp", "linear_3d", "conv1d", "conv_depthwise", "embedding", "tied", "layer_norm"])
def test_products_with_other_rows(name: str) -> None:
    """Of another number of samples, with other numbers of rows, and with scalar rows."""
    entry = next(e for e in ZOO if e.name == name)
    model, batch = entry.build()
    _, other = entry.build(seed=5)
    other = tuple(t[:2] for t in other)
    made: list[Callable[[], Tensor]] = [
        lambda: vectors(model, batch),
        lambda: vectors(model, other)[:, :2],
        lambda: vectors(model, other).sum(1),
    ]
    jacs = [capture_rows(model, closure) for closure in made]
    denses = [dense(jacobian(lambda c=closure: c().flatten(), trainable(model))) for closure in made]
    for left, J in zip(jacs, denses, strict=True):
        for right, K in zip(jacs, denses, strict=True):
            close(left.cross_gram(right), J @ K.T)


class Collect:
    """A sketch that takes few rows at a time, and cuts samples apart."""

    sketch_size = 3

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def insert(self, blocks: dict[str, Tensor]) -> None:
        self.rows.append(torch.cat(list(blocks.values()), 1))


@pytest.mark.parametrize("name", ["mlp", "linear_3d", "conv2d", "conv_frames", "embedding", "tied"])
def test_a_sketch_gets_the_rows_in_their_order(name: str) -> None:
    jac, truth = case(next(e for e in ZOO if e.name == name))
    sketch = Collect()
    jac.sketch_into(sketch)
    assert len(sketch.rows) > 1
    close(torch.cat(sketch.rows), dense(truth))


@pytest.mark.parametrize("name", ["mlp", "linear_3d", "conv1d"])
def test_factors_and_layer_rows_take_every_row_for_a_sample(name: str) -> None:
    model, _ = next(e for e in ZOO if e.name == name).build()
    jac, truth = case(next(e for e in ZOO if e.name == name))
    weight = next(n for n, p in model.named_parameters() if p.ndim > 1)
    x, g = jac.layer_rows(weight)
    assert len(x) == len(g) == jac.num_rows
    close((g.mT @ x)[..., : truth[weight].flatten(2).shape[2]], truth[weight].flatten(2))
    factors = next(f for names, f in jac.kronecker_factors().items() if weight in names)
    close(factors.grad_factor, torch.einsum("rsi,rsj->ij", g, g) / jac.num_rows)
    close(factors.input_factor, torch.einsum("rsi,rsj->ij", x, x) / (len(x) * x.shape[1]))


@pytest.mark.parametrize("name", ["mlp", "linear_3d", "conv2d", "embedding", "layer_norm"])
def test_records_are_made_again_of_their_parts(name: str) -> None:
    jac, _ = case(next(e for e in ZOO if e.name == name))
    for record in jac.records:
        form = pickle.loads(pickle.dumps(RecordForm.of(record)))
        again = form.build([t.clone() for t in record.parts()[1]])
        assert type(again) is type(record)
        assert again.num_rows == record.num_rows == form.num_rows
        close(again.gram(torch.float64, 1 << 28), record.gram(torch.float64, 1 << 28))


# Blocks


def test_blocks_of_scalars_and_vectors_are_stacked_in_their_order() -> None:
    model = nn.Sequential(L(5, 6), nn.Tanh(), nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 3, 2), nn.Flatten(), L(6, 3))
    model = model.double()
    x, y, z = points(4), points(3), points(5)

    def blocks() -> dict[str, Tensor]:
        return {"one": rows_of(model(x)), "three": model(y).tanh(), "two": model(z)[:, :2], "again": model(z) ** 2}

    jac = capture_rows(model, blocks)
    assert jac.num_rows == 4 + 9 + 10 + 15
    truth = jacobian(lambda: torch.cat([b.flatten() for b in blocks().values()]), trainable(model))
    errors = reduction_errors(jac, truth)
    assert max(errors.values()) <= 1e-10, errors
    assert not any(type(r).__name__ == "MaterializedRecord" for r in jac.records)


def test_vector_blocks_of_one_kind_stay_small() -> None:
    model = mlp()
    x, y = points(4), points(3)
    jac = capture_rows(model, lambda: {"a": model(x), "b": model(y) ** 2})
    assert all(isinstance(record, LinearVectorRecord) for record in jac.records)
    truth = jacobian(lambda: torch.cat([model(x).flatten(), (model(y) ** 2).flatten()]), trainable(model))
    assert max(reduction_errors(jac, truth).values()) <= 1e-10


def test_blocks_with_different_parameters_and_lengths() -> None:
    model = Net(lambda n, x: x, a=L(5, 3), b=L(5, 2)).double()
    x, y, z = points(4), points(3), torch.randn(2, 6, 5, dtype=torch.float64)

    def blocks() -> dict[str, Tensor]:
        return {"first": model.a(x), "second": model.b(y), "long": model.b(z).sin().sum(1)}

    jac = capture_rows(model, blocks)
    truth = jacobian(lambda: torch.cat([b.flatten() for b in blocks().values()]), trainable(model))
    assert max(reduction_errors(jac, truth).values()) <= 1e-10


def test_samples_that_share_a_row_vector() -> None:
    """Two adjacent samples own K rows: means over sub-batches."""
    model, x = mlp(), points(6)

    def closure() -> Tensor:
        return model(x).tanh().view(3, 2, 3).mean(1)

    jac = capture_rows(model, closure)
    assert max(reduction_errors(jac, jacobian(lambda: closure().flatten(), trainable(model))).values()) <= 1e-10


# The batched backward


class Looks(torch.autograd.Function):
    """A custom function whose backward looks at numbers, which no batch of backwards can."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad if grad.sum() > 0 else 2.0 * grad


def forgetful(h: Tensor) -> Tensor:
    return F.dropout(h.tanh(), 0.3)


FALLBACKS: dict[str, Callable[[Tensor], Tensor]] = {
    "custom": lambda h: Looks.apply(h).tanh(),
    "dropout": lambda h: checkpoint(forgetful, h, use_reentrant=False),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_without_a_batched_rule_there_are_k_backwards_and_the_same_numbers(name: str) -> None:
    model = Net(lambda n, x: n.b(FALLBACKS[name](n.a(x))), a=L(5, 4), b=L(4, 3)).double()
    x, capture = points(), st.Capture(model)

    def closure() -> Tensor:
        torch.manual_seed(2)
        return model(x).tanh()

    for _ in range(3):
        jac = capture_rows(capture, closure)
        truth = jacobian(lambda: closure().flatten(), trainable(model))
        assert max(reduction_errors(jac, truth).values()) <= 1e-10
    assert list(capture._components._batched.values()) == [False]


def test_one_backward_serves_all_components(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = mlp(), points()
    capture = st.Capture(model)
    passes: list[bool] = []
    grad = torch.autograd.grad

    def counted(*args: Any, **kwargs: Any) -> Any:
        passes.append(kwargs.get("is_grads_batched", False))
        return grad(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    for _ in range(3):
        passes.clear()
        capture_rows(capture, lambda: model(x))
    assert passes == [True]  # the third batch is not probed


def test_running_out_of_memory_is_no_reason_for_k_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = mlp(), points()
    grad = torch.autograd.grad

    def full(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("is_grads_batched"):
            raise torch.OutOfMemoryError("too much")
        return grad(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", full)
    with pytest.raises(torch.OutOfMemoryError):
        capture_rows(model, lambda: model(x))


def test_a_copy_of_a_capture_learns_for_itself() -> None:
    model, x = mlp(), points()
    capture = st.Capture(model)
    capture_rows(capture, lambda: model(x))
    again = copy.deepcopy(capture)
    assert capture._components._batched
    assert not again._components._batched


def test_the_graph_is_gone_or_kept_as_for_scalar_rows() -> None:
    model, x = mlp(), points()
    capture = st.Capture(model)
    for _ in range(2):
        with capture:
            rows = model(x).tanh()
        capture.jacobian(rows)
    with capture:
        rows = model(x).tanh()
    torch.autograd.backward(rows.sum())
    with pytest.raises(CaptureError, match="graph of the rows was freed"):
        capture.jacobian(rows)


# Rows that interact, and shapes that may be misread

INTERACTING: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "mean_over_the_batch": lambda n, x: n(x) - n(x).mean(0),
    "transposed": lambda n, x: n(x).T,
    "flipped": lambda n, x: n(x).flip(0),
    "cancels_in_the_sum_of_a_sample": lambda n, x: torch.softmax(n(x) + n(x).mean(0), 1),
    "one_component_of_all": lambda n, x: torch.cat([n(x)[:, :1], n(x)[:, 1:].cumsum(0)], 1),
    "weak": lambda n, x: n(x) + 1e-9 * n(x).sum(0),
    "softmax_over_the_batch": lambda n, x: torch.softmax(n(x), 0),
}


@pytest.mark.parametrize("name", INTERACTING)
def test_rows_of_several_samples_are_refused_or_exact(name: str) -> None:
    model, x = mlp(), points(3)  # as many samples as components
    capture = st.Capture(model)
    try:
        jac = capture_rows(capture, lambda: INTERACTING[name](model, x))
    except UnsupportedModelError:
        return
    assert name in {"flipped"}
    truth = jacobian(lambda: INTERACTING[name](model, x).flatten(), trainable(model))
    assert max(reduction_errors(jac, truth).values()) <= 1e-10


def test_an_interaction_that_begins_later_is_found_by_the_next_probe() -> None:
    model, x = mlp(), points()
    capture = st.Capture(model, probe_every=1)
    for share in (0.0, 0.0, 0.5):
        rows = lambda share=share: torch.softmax(model[2](model[0](x) - share * model[0](x).mean(0)), 1)  # noqa: E731
        if share:
            with pytest.raises(UnsupportedModelError, match="cannot be told apart"):
                capture_rows(capture, rows)
        else:
            capture_rows(capture, rows)


def long() -> Tensor:
    return torch.randn(6, 6, 5, dtype=torch.float64)


FLATTENED: dict[str, Callable[[nn.Module], Tensor]] = {
    "wide": lambda n: n(points()).flatten(),
    "transposed": lambda n: n(points()).T.flatten(),
    "one_sample": lambda n: n(points(1)).flatten(),
    "as_many_components_as_samples": lambda n: n(points(3)).flatten(),
    "a_long_axis_of_as_many": lambda n: n(torch.randn(2, 6, 5, dtype=torch.float64)).sum(1).flatten(),
    "positions": lambda n: n(long()).mean(1).flatten(),
    "first_component_twice": lambda n: n(points())[:, :1].expand(-1, 2).flatten(),
}


@pytest.mark.parametrize("name", FLATTENED)
def test_flattened_vectors_are_exact_or_refused_with_the_remedy(name: str) -> None:
    """Of K components of each sample, no layer's output has B K samples: they are given as [B, K]."""
    model = mlp()
    torch.manual_seed(1)
    refusal = exact_or_refused(model, model, lambda: (torch.manual_seed(1), FLATTENED[name](model))[1])
    assert "(batch, K)" in refusal


@pytest.mark.parametrize("shape", [(6, 3, 2), (6, 0), ()], ids=str)
def test_blocks_of_other_shapes_are_refused_by_name(shape: tuple[int, ...]) -> None:
    model, x = mlp(), points()
    capture = st.Capture(model)
    with capture:
        rows = model(x).sum() * torch.ones(shape, dtype=torch.float64)
    with pytest.raises(CaptureError, match=r"Block 'field' has shape .* \(batch, K\)"):
        capture.jacobian({"field": rows})


@pytest.mark.parametrize("name", ["mlp", "conv2d", "layer_norm", "gpt"])
def test_autocast_and_float32(name: str) -> None:
    entry = next(e for e in ZOO if e.name == name)
    model, batch = entry.build(torch.float32)

    def closure() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return vectors(model, batch).float()

    jac = capture_rows(model, closure)
    assert all(g.dtype == torch.float32 for g in jac.per_sample_grads().values())
    assert jac.gram().dtype == torch.float64
    assert max(reduction_errors(jac, jacobian(lambda: closure().flatten(), trainable(model))).values()) <= 3e-2
    exact = capture_rows(model, lambda: vectors(model, batch))
    truth = jacobian(lambda: vectors(model, batch).flatten(), trainable(model))
    assert max(reduction_errors(exact, truth).values()) <= 1e-5


def test_an_unused_scalar_parameter_has_a_zero_gradient() -> None:
    model = Net(lambda n, x: n.fc(x), fc=L(5, 3), scale=nn.Parameter(torch.tensor(2.0))).double()
    x = points()
    assert capture_rows(model, lambda: model(x)).vjp(torch.ones(18))["scale"] == 0
