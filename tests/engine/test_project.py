"""Inner products with sketches, norms and the halves of a layer's rows, over the zoo and against dense matrices."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

import steepest as st
from capturing import capture_rows, mlp, points
from oracles import dense, entry_truth
from steepest.errors import CaptureError, UnsupportedModelError
from steepest.training.memory import peak_memory
from zoo import ZOO, Entry
from zoo_parts import Net

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

ENTRIES = pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
KINDS = pytest.mark.parametrize("kind", [st.Capture, st.ReferenceCapture], ids=["fast", "reference"])


@lru_cache(maxsize=4)
def case(entry: Entry, kind: type, max_memory: int = 1 << 28) -> tuple[st.Jacobian, Tensor]:
    """A Jacobian of one entry and the dense truth."""
    model, batch = entry.build(torch.float64)
    try:
        capture = kind(model, max_memory=max_memory)
        with capture:
            rows = entry.losses(model, batch)
        jac = capture.jacobian(rows)
    except (UnsupportedModelError, CaptureError) as error:
        if entry.expect == "safe":
            pytest.skip(f"refused by name, as it may be: {error}")
        raise
    return jac, dense(entry_truth(entry, model, batch))


@pytest.fixture(scope="module", autouse=True)
def _free_cases() -> Iterator[None]:
    yield
    case.cache_clear()


def vectors_for(jac: st.Jacobian, count: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {name: torch.randn(count, *shape, dtype=dtype) for name, shape in jac.shapes.items()}


def flat(vectors: dict[str, Tensor]) -> Tensor:
    return torch.cat([v.reshape(len(v), -1) for v in vectors.values()], 1)


def check(jac: st.Jacobian, truth: Tensor, tolerance: float = 1e-10) -> None:
    """A few vectors and many: the two sides of the choice between the forms."""
    for count in (1, 3, 40):
        vectors = vectors_for(jac, count)
        expected = truth @ flat(vectors).T
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(jac.project(vectors), expected, rtol=0, atol=tolerance * scale)
    expected = truth.square().sum(1)
    norms = jac.squared_norms()
    assert norms.dtype == torch.float64
    torch.testing.assert_close(norms, expected, rtol=0, atol=tolerance * max(1.0, float(expected.max())))


@KINDS
@ENTRIES
def test_projections_and_norms_equal_the_dense_ones(entry: Entry, kind: type) -> None:
    check(*case(entry, kind))


@ENTRIES
def test_they_do_row_by_row_in_the_least_memory(entry: Entry) -> None:
    check(*case(entry, st.Capture, 1))


@ENTRIES
def test_a_sketch_sees_the_rows_a_few_at_a_time(entry: Entry) -> None:
    """One sketch fed through the capture, one with the dense rows: the same up to float32."""
    jac, truth = case(entry, st.Capture)
    seen = []

    class Sketch(st.FrequentDirections):
        def insert(self, rows: dict[str, Tensor]) -> None:
            seen.append(len(next(iter(rows.values()))))
            super().insert(rows)

    sketch, plain = Sketch(2), st.FrequentDirections(2)
    jac.sketch_into(sketch)
    plain.insert(truth)
    assert max(seen) <= 2
    assert sum(seen) == sketch.num_rows == jac.num_rows
    assert tuple(sketch.sketch()) == jac.names
    made, expected = flat(sketch.sketch()).double(), plain.sketch().double()
    atol = 1e-5 * float(truth.square().sum())
    torch.testing.assert_close(made.T @ made, expected.T @ expected, rtol=0, atol=atol)


def test_a_sketch_gives_its_own_rows_to_projections() -> None:
    model, x = mlp(), points()
    jac = capture_rows(model, lambda: model(x).square().sum(1))
    sketch = st.FrequentDirections(4)
    jac.sketch_into(sketch)
    blocks = sketch.sketch()  # [l, numel]
    torch.testing.assert_close(jac.project(blocks), jac.to_dense() @ flat(blocks).double().T)


@pytest.mark.parametrize(("wide", "deep"), [(30, 4), (4, 30)])
def test_no_row_is_formed_where_a_layer_has_one_position(wide: int, deep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(wide, deep).double()
    jac = capture_rows(model, lambda: model(torch.randn(9, wide).double()).square().sum(1))
    truth = jac.to_dense()

    def forbidden(*_: object) -> None:
        pytest.fail("explicit gradients were made")

    for record in jac._records:
        monkeypatch.setattr(type(record), "per_sample_grads", forbidden)
    vectors = vectors_for(jac, 5)
    torch.testing.assert_close(jac.project(vectors), truth @ flat(vectors).T)
    torch.testing.assert_close(jac.squared_norms(), truth.square().sum(1))


def test_no_row_is_formed_of_a_large_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that occur twice in a row add up before they are squared."""
    model = nn.Embedding(50, 3).double()
    tokens = torch.tensor([[1, 1, 4], [7, 2, 7], [0, 0, 0]])
    jac = capture_rows(model, lambda: model(tokens).square().sum((1, 2)))
    truth = jac.to_dense()
    monkeypatch.setattr(type(jac._records[0]), "per_sample_grads", lambda *_: pytest.fail("explicit gradients"))
    vectors = vectors_for(jac, 5)
    torch.testing.assert_close(jac.project(vectors), truth @ flat(vectors).T)
    torch.testing.assert_close(jac.squared_norms(), truth.square().sum(1))


@KINDS
def test_memory_stays_within_its_limit(kind: type) -> None:
    """Patches and explicit gradients of a convolution take 30 times the limit."""
    torch.manual_seed(0)
    model = nn.Conv2d(8, 16, 3, padding=1)
    x = torch.randn(64, 8, 20, 20)
    limit = 1 << 19
    capture = kind(model, max_memory=limit)
    with capture:
        rows = model(x).square().sum((1, 2, 3))
    jac = capture.jacobian(rows)
    vectors = vectors_for(jac, 4, torch.float32)

    def reduce() -> None:
        jac.project(vectors)
        jac.squared_norms()

    peak = peak_memory("cpu", reduce)
    inherent = 3 * 4 * 20 * 20 * 16  # a few copies of one row's output gradients
    assert peak < 2 * limit + inherent, f"{peak} bytes with max_memory={limit}"


def test_precision_is_the_parameters_own_whatever_autocast_says() -> None:
    model, x = mlp().float(), points().float()
    jac = capture_rows(model, lambda: model(x).square().sum(1))
    vectors = vectors_for(jac, 3, torch.float32)
    plain = jac.project(vectors)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert torch.equal(jac.project(vectors), plain)
        assert jac.layer_rows("0.weight")[0].dtype == torch.float32
    assert plain.dtype == torch.float32


def test_norms_beyond_float32_are_held() -> None:
    model = nn.Linear(2, 1)
    jac = capture_rows(model, lambda: model(torch.full((3, 2), 1e15)).squeeze(1) * 1e15)
    assert jac.squared_norms().tolist() == pytest.approx([2e60] * 3, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda v: v.pop("0.bias"), "only one of them has '0.bias'"),
        (lambda v: v.update(head=torch.ones(2)), "only one of them has 'head'"),
        (lambda v: v.update({"2.weight": torch.ones(2, 6, 3)}), r"'2.weight' have shape \(2, 6, 3\).*\(2, 3, 6\)"),
        (lambda v: v.update({"2.bias": torch.ones(3, 3)}), r"'2.bias' have shape \(3, 3\): give 2"),
        (lambda v: v.update({"2.bias": torch.ones(2)}), r"'2.bias' have shape \(2,\)"),
    ],
    ids=["missing", "unknown", "transposed", "another number", "flat"],
)
def test_vectors_of_something_else_are_refused(change: object, found: str) -> None:
    model, x = mlp(), points()
    jac = capture_rows(model, lambda: model(x).square().sum(1))
    vectors = vectors_for(jac, 2)
    change(vectors)  # type: ignore[operator]
    with pytest.raises(st.InvalidOptionError, match=found):
        jac.project(vectors)


def test_no_vectors_give_no_columns() -> None:
    model, x = mlp(), points()
    jac = capture_rows(model, lambda: model(x).square().sum(1))
    assert jac.project(vectors_for(jac, 0)).shape == (6, 0)


def test_restricted_rows_are_projected_on_what_is_kept() -> None:
    model, x = mlp(), points()
    jac = capture_rows(model, lambda: model(x).square().sum(1))
    jac = jac.restrict(jac.sample_outputs(0.5, torch.Generator().manual_seed(0)))
    check(jac, jac.to_dense())


@pytest.mark.parametrize(
    ("model", "x", "name"),
    [
        (nn.Linear(5, 3), torch.randn(4, 5), "weight"),
        (nn.Linear(5, 3, bias=False), torch.randn(4, 2, 5), "weight"),
        (nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2)), torch.randn(4, 2, 4, 4), "0.weight"),
    ],
    ids=["one position", "two positions", "convolution"],
)
def test_a_layers_rows_make_its_gradients(model: nn.Module, x: Tensor, name: str) -> None:
    jac = capture_rows(model, lambda: model(x).square().flatten(1).sum(1))
    inputs, grads = jac.layer_rows(name)
    made = torch.einsum("rso,rsi->roi", grads, inputs)
    expected = jac.per_sample_grads()
    bias = name.replace("weight", "bias")
    whole = expected[name].flatten(2)
    if bias in expected:
        whole = torch.cat([whole, expected[bias].unsqueeze(2)], 2)
    torch.testing.assert_close(made, whole)


def test_parameters_that_are_no_layers_weight_have_no_rows() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(8, 3), nn.LayerNorm(3))
    x = torch.randn(5, 4, 4)
    jac = capture_rows(model, lambda: model(x).square().sum(1))
    for name in ("0.weight", "2.bias", "3.weight"):
        with pytest.raises(st.UnsupportedModelError, match=f"{name!r} is not the weight"):
            jac.layer_rows(name)
    with pytest.raises(st.InvalidOptionError, match=r"no parameter 'head\.weight'"):
        jac.layer_rows("head.weight")
    reference = st.ReferenceCapture(model)
    with reference:
        rows = model(x).square().sum(1)
    with pytest.raises(st.UnsupportedModelError, match=r"steepest\.Capture"):
        reference.jacobian(rows).layer_rows("2.weight")


def test_a_tied_weight_and_an_unused_one_have_no_rows() -> None:
    net = Net(lambda n, x: n.b(n.a(x).sum(1)), a=nn.Embedding(6, 3), b=nn.Linear(3, 6), spare=nn.Linear(2, 2))
    net.b.weight = net.a.weight
    jac = capture_rows(net, lambda: net(torch.randint(6, (4, 2))).square().sum(1))
    for name in ("a.weight", "spare.weight"):
        with pytest.raises(st.UnsupportedModelError, match="not the weight"):
            jac.layer_rows(name)
