"""Products of the rows of two batches, and records that become tensors and records again."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor, nn

import steepest as st
from capturing import capture_rows
from steepest.engine.packing import RecordForm
from steepest.engine.records import MaterializedRecord, Record
from steepest.errors import InvalidOptionError, UnsupportedModelError
from zoo import ZOO, Entry


def two_batches(entry: Entry) -> tuple[st.Jacobian, st.Jacobian]:
    """Of one model, the second with fewer rows."""
    model, batch = entry.build()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        other = tuple(t[: max(2, len(t) - 1)] for t in entry.batch(torch.float64, 7))
        return tuple(capture_rows(st.Capture(model), entry.closure(model, b)) for b in (batch, other))  # type: ignore[return-value]


def again(record: Record) -> Record:
    """What another process makes of a record that it was sent."""
    form = pickle.loads(pickle.dumps(RecordForm.of(record)))
    room = form.empty(torch.device("cpu"))
    tensors = record.parts()[1]
    assert form.nbytes == sum(t.numel() * t.itemsize for t in tensors)
    assert [(t.shape, t.dtype) for t in room] == [(t.shape, t.dtype) for t in tensors]
    for place, tensor in zip(room, tensors, strict=True):
        place.copy_(tensor)
    return form.build(room)


def worst(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("entry", [e for e in ZOO if e.name != "two_blocks"], ids=lambda entry: entry.name)
def test_products_with_the_rows_of_another_batch_are_those_of_the_dense_matrices(entry: Entry) -> None:
    try:
        one, two = two_batches(entry)
    except UnsupportedModelError:
        assert entry.expect == "safe"
        return
    want = one.to_dense() @ two.to_dense().T
    assert worst(one.cross_gram(two), want) <= 1e-12
    assert worst(two.cross_gram(one), want.T) <= 1e-12
    # The same with so little memory that everything is done in pieces, and with records that were sent.
    small = [st.Jacobian([again(r) for r in j.records], j.shapes, j.num_rows, 1, j.device, j.dtype) for j in (one, two)]
    assert worst(small[0].cross_gram(small[1]), want) <= 1e-12
    assert worst(one.cross_gram(two, "float32").double(), want) <= 2e-6
    for jacobian, copy in zip((one, two), small, strict=True):
        assert worst(copy.to_dense(), jacobian.to_dense()) <= 1e-14  # contiguous copies may sum in another order
        for record in jacobian.records:
            explicit = RecordForm.of(record).explicit()
            assert explicit == RecordForm.of(record.materialize())
            alone = record.cross_gram(record, torch.float64, 1 << 20)
            assert worst(alone, record.gram(torch.float64, 1 << 20)) <= 1e-12


def test_records_of_different_kinds_and_groups_of_the_same_parameters_have_products() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3)).double()
    model.append(nn.LayerNorm(3, dtype=torch.float64))
    first, second = torch.randint(9, (5, 3)), torch.randint(9, (4, 3))
    fast = capture_rows(model, lambda: model(first).square().sum(1))
    slow = capture_rows(st.ReferenceCapture(model), lambda: model(second).square().sum(1))  # type: ignore[arg-type]
    assert {type(r) for r in slow.records} == {MaterializedRecord}
    want = fast.to_dense() @ slow.to_dense().T
    assert worst(fast.cross_gram(slow), want) <= 1e-12
    assert worst(slow.cross_gram(fast), want.T) <= 1e-12
    kept = fast.sample_outputs(0.5, torch.Generator().manual_seed(0))
    cut = fast.restrict(kept)
    assert worst(cut.cross_gram(slow.restrict(kept)), cut.to_dense() @ slow.restrict(kept).to_dense().T) <= 1e-12
    with pytest.raises(InvalidOptionError, match=r"'2.weight'.*restrict both alike"):
        cut.cross_gram(slow)


def test_products_keep_within_the_memory_they_are_given() -> None:
    torch.manual_seed(2)
    rows, shared, size = 24, 32, 96
    layer = nn.Linear(size, size, bias=False)
    one, two = (torch.randn(rows, shared, size) for _ in range(2))
    limit = 1 << 17
    grads = rows * size * size * 4
    assert grads > 4 * limit  # explicit gradients of one side alone would not fit

    from torch.profiler import ProfilerActivity, profile

    def peak(memory: int) -> int:
        jacobians = []
        for x in (one, two):
            capture = st.Capture(layer, max_memory=memory)
            with capture:
                losses = layer(x).square().sum((1, 2))
            jacobians.append(capture.jacobian(losses))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            jacobians[0].cross_gram(jacobians[1])
        events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
        held, most = 0, 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            most = max(most, held)
        return most

    assert peak(limit) <= 2.5 * limit
    assert peak(1 << 28) > 4 * limit  # the measure sees what is spent
