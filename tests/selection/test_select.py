"""select_subset: options, passes, what it refuses, and that it leaves everything as it was."""

import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import steepest as st
from selecting import CROSS_ENTROPY, Toy, ToyRun, net, points
from steepest.errors import InvalidOptionError, SelectionError
from steepest.selection import Picked, Progress, Rows, Run


def choose(data: Any = None, **options: Any) -> st.Selection:
    options = {"fraction": 0.2, "method": Toy(), "batch_size": 8} | options
    options = {name: value for name, value in options.items() if value is not ...}
    return st.select_subset(net(), points() if data is None else data, CROSS_ENTROPY, **options)


class Dicts(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x, y = points()
        return {"x": x[index], "label": y[index]}


class Plain(Dataset[tuple[Tensor, Tensor]]):
    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = points()
        return x[index], y[index]


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(*points(), strict=True))


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = points()
        return x[index] + 1e-3 * torch.randn(4), y[index]


def batches() -> list[tuple[Tensor, Tensor]]:
    x, y = points()
    return list(zip(x.split(8), y.split(8), strict=True))


KINDS: dict[str, Any] = {
    "tensor dataset": TensorDataset(*points()),
    "shuffling loader": DataLoader(TensorDataset(*points()), batch_size=8, shuffle=True),
    "loader with workers": DataLoader(Plain(), batch_size=8, shuffle=True, num_workers=1),
    "stream": Stream(),
    "batches": batches(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data_gives_the_same_choice(kind: str) -> None:
    expected = choose()
    found = choose(KINDS[kind], batch_size=... if kind in {"batches", "shuffling loader"} else 8)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.labels, points()[1])
    assert found.report.mean_cosine == pytest.approx(expected.report.mean_cosine, abs=1e-5)
    assert found.report.duplicates == 0


def test_dicts_go_through_batch_losses() -> None:
    found = st.select_subset(
        net(),
        Dicts(),
        fraction=0.2,
        method=Toy(),
        batch_size=8,
        batch_losses=lambda model, batch: CROSS_ENTROPY(model(batch["x"]), batch["label"]),
    )
    assert torch.equal(found.indices, choose().indices)
    assert torch.equal(found.labels, points()[1])


@pytest.mark.parametrize(("fraction", "number", "kept"), [(0.1, 25, 3), (0.5, 5, 3), (1e-9, 50, 1), (1.0, 7, 7)])
def test_a_fraction_is_rounded_to_the_nearest_number(fraction: float, number: int, kept: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(choose(points(number), fraction=fraction)) == kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": ...}, "neither was given: give either fraction"),
        ({"count": 3}, r"fraction=0\.2 and count=3 were given"),
        ({"fraction": 0.0}, r"fraction=0\.0: give a finite number in \(0, 1\]"),
        ({"fraction": 1.1}, r"fraction=1\.1"),
        ({"fraction": "0.1"}, "fraction='0.1'"),
        ({"fraction": ..., "count": 0}, "count=0: give an integer of at least 1"),
        ({"fraction": ..., "count": 2.0}, r"count=2\.0"),
        ({"fraction": ..., "count": 51}, "count=51: the data have 50 samples; keep 1 to 50"),
        ({"method": Toy}, r"method=Toy is a class: give an instance, Toy\(\)"),
        ({"method": "sage"}, "method='sage' is no selection method"),
        ({"method": Toy(reference=True)}, r"Toy.* compares with a reference set, and none was given"),
        ({"reference": points()}, "Toy.* looks at no reference set: leave reference= out"),
        ({"batch_losses": lambda _m, _b: None}, "both loss_fn and batch_losses were given"),
        ({"device": "nowhere"}, "device='nowhere' cannot be used"),
        ({"checkpoint_every": -1}, "checkpoint_every=-1"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels has 3 entries and the data 50 samples"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"progress": 5}, "progress=5: give a function that takes a Progress"),
        ({"checkpoint": 5}, "checkpoint=5 names no file: give the path of one"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        choose(**options)


def test_a_method_that_scores_needs_a_model_and_a_loss() -> None:
    with pytest.raises(InvalidOptionError, match="scores samples with a model, and model is None"):
        st.select_subset(None, points(), CROSS_ENTROPY, fraction=0.1, method=Toy())
    with pytest.raises(InvalidOptionError, match="model is a int: give a torch"):
        st.select_subset(3, points(), CROSS_ENTROPY, fraction=0.1, method=Toy())  # type: ignore[arg-type]
    with pytest.raises(InvalidOptionError, match="neither loss_fn nor batch_losses was given"):
        st.select_subset(net(), points(), fraction=0.1, method=Toy())


def test_a_number_larger_than_a_stream_is_refused_after_the_first_pass() -> None:
    with pytest.raises(InvalidOptionError, match="count=51: the data have 50 samples"):
        choose(Stream(), fraction=..., count=51)


def test_a_method_without_passes_needs_no_model() -> None:
    selection = st.select_subset(None, points(), fraction=0.2, method=st.Random(seed=3))
    assert len(selection) == 10
    assert selection.model_hash == ""
    assert selection.report.mean_cosine is None
    assert selection.report.class_counts is not None
    assert sum(kept for kept, _ in selection.report.class_counts.values()) == 10
    scored = st.select_subset(net(), points(), CROSS_ENTROPY, fraction=0.2, method=st.Random(seed=3))
    assert torch.equal(scored.indices, selection.indices)
    assert scored.report.mean_cosine is not None
    assert scored.fingerprint == selection.fingerprint


def test_random_knows_the_length_of_a_stream_without_labels() -> None:
    data = [points()[0][:20], points()[0][20:]]
    selection = st.select_subset(None, [(part,) for part in data], count=7, method=st.Random())
    assert (len(selection), selection.num_samples, selection.labels) == (7, 50, None)


def test_a_review_that_cannot_be_made_does_not_keep_random_from_choosing() -> None:
    class Coupled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x - x.mean(0))
            return out - out.mean(0)

    selection = st.select_subset(Coupled(), points(), CROSS_ENTROPY, fraction=0.2, method=st.Random())
    assert selection.report.mean_cosine is None
    assert any("were not compared" in note for note in selection.report.notes)


def test_random_augmentation_is_refused() -> None:
    with pytest.raises(SelectionError, match=r"the data changed between passes.*Random augmentation"):
        choose(Augmented())


def test_a_reference_set_is_read_in_the_passes_that_ask_for_it() -> None:
    x, y = points()
    selection = choose(method=Toy(reference=True), reference=TensorDataset(x[:10], y[:10]))
    other = choose(method=Toy(reference=True), reference=TensorDataset(x[10:20], y[10:20]))
    assert not torch.equal(selection.scores, other.scores)
    assert selection.fingerprint == other.fingerprint == choose().fingerprint


def test_a_model_that_changes_while_it_scores_is_refused() -> None:
    model = net()

    def drift(outputs: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            next(model.parameters()).add_(1.0)
        return CROSS_ENTROPY(outputs, targets)

    with pytest.raises(SelectionError, match="the model changed while it scored"):
        st.select_subset(model, points(), drift, fraction=0.2, method=Toy(), batch_size=8)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_and_the_random_state_are_left_as_they_were(fails: bool) -> None:
    model = net()
    model[0].eval()
    model[1].requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    data = (points()[0].clone(), points()[1])
    if fails:
        data[0][13] = torch.nan
        with pytest.raises(st.NonFiniteError, match="13"):
            st.select_subset(model, data, CROSS_ENTROPY, fraction=0.2, method=Toy())
    else:
        st.select_subset(model, data, CROSS_ENTROPY, fraction=0.2, method=Toy(), device="cpu")
    assert ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]) == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_progress_tells_one_estimate_and_every_batch() -> None:
    told: list[Progress] = []
    selection = choose(progress=told.append)
    estimates = [step for step in told if step.kind == "estimate"]
    assert len(estimates) == 1
    assert told[3].kind == "estimate"  # after four batches
    estimate = estimates[0].estimate
    assert estimate is not None
    assert (estimate.samples, estimate.passes, estimate.bytes) == (50, 2, 1234)
    assert estimate.seconds == estimates[0].seconds > 0
    places = [(step.pass_number, step.batch, step.batches) for step in told if step.kind == "batch"]
    assert places == [(number, batch, 7) for number in (0, 1) for batch in range(1, 8)]
    assert [(step.batch, step.batches) for step in told if step.kind == "review"] == [(1, 2), (2, 2)]
    seconds = [step.seconds for step in told if step.kind == "batch"]
    assert seconds == sorted(seconds)
    assert selection.report.estimate == estimate
    assert selection.report.seconds >= seconds[-1]


def test_the_estimate_weighs_passes_that_cost_unequally(monkeypatch: pytest.MonkeyPatch) -> None:
    update = ToyRun.update

    def slow(self: ToyRun, number: int, rows: Rows) -> None:
        time.sleep((0.02, 0.002)[number])
        update(self, number, rows)

    monkeypatch.setattr(ToyRun, "update", slow)
    monkeypatch.setattr(ToyRun, "effort", lambda _self, number: (1.0, 0.1)[number])
    report = choose(points(200)).report  # 25 batches: 0.5 s in the first pass, 0.05 in the second
    assert report.estimate is not None
    assert report.estimate.seconds is not None
    assert 0.55 < report.estimate.seconds < 0.9


def test_only_the_sketch_of_sage_costs_much() -> None:
    for method, passes in ((st.SAGE(), 1), (st.SAGE(consensus="sketch"), 2), (st.SAGE(consensus="reference"), 2)):
        run = method.begin()
        assert [run.effort(number) for number in range(run.passes)] == [1.0] + [0.1] * passes


@pytest.mark.parametrize("method", [st.Herding(), st.KCenter(), st.GradMatch(tolerance=0.0)])
def test_a_choice_of_one_after_another_tells_how_far_it_is_and_can_be_ended(method: Any) -> None:
    told: list[Progress] = []
    whole = choose(points(300), method=method, fraction=0.5, progress=told.append)
    steps = [step for step in told if step.kind == "pick"]
    assert steps[0].batch < steps[-1].batch == 150
    assert {step.batches for step in steps} == {150}
    seconds = [step.seconds for step in told if step.kind != "estimate" and step.kind != "review"]
    assert seconds == sorted(seconds)
    assert steps[-1].seconds <= whole.report.seconds

    def stop(step: Progress) -> None:
        if step.kind == "pick":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        choose(points(300), method=method, fraction=0.5, progress=stop)


def test_the_length_of_a_stream_is_unknown_in_its_estimate() -> None:
    told: list[Progress] = []
    choose(Stream(), progress=told.append)
    estimate = next(step.estimate for step in told if step.kind == "estimate")
    assert estimate is not None
    assert estimate.samples is estimate.seconds is None
    assert [step.batches for step in told if step.kind == "batch"] == [None] * 7 + [7] * 7


def test_vanished_classes_are_a_note_and_one_warning() -> None:
    x, y = points()
    with pytest.warns(UserWarning, match="of 3 classes was kept") as caught:
        selection = st.select_subset(net(), (x, y), CROSS_ENTROPY, count=2, method=Toy())
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert sum("classes was kept" in note for note in selection.report.notes) == 1
    assert "Fewer samples were kept (2) than there are classes (3)." in selection.report.notes
    assert "a note of the method." in selection.report.notes


def test_a_class_with_a_share_below_one_sample_is_told() -> None:
    x, y = points()
    y = torch.where(torch.arange(50) < 48, 0, 1)
    selection = st.select_subset(None, (x, y), fraction=0.2, method=st.Random())
    assert any(
        "share of 1 of 2 classes in 10 samples is less than one sample (label 1)" in n for n in selection.report.notes
    )


def test_user_labels_take_the_place_of_those_in_the_batches() -> None:
    own = torch.arange(50) % 2
    selection = choose(labels=own)
    assert torch.equal(selection.labels, own)
    assert selection.fingerprint != choose().fingerprint


def test_the_report_holds_what_the_method_measured() -> None:
    selection = choose()
    assert selection.method == "toy"
    assert selection.options == {"scope": "last", "passes": 2, "reference": False}
    assert selection.report.numbers == {"certificate": 0.5}
    assert (selection.report.passes, selection.report.kept, selection.report.num_samples) == (2, 10, 50)
    assert len(selection.model_hash) == len(selection.fingerprint) == 64


def test_a_method_that_picks_wrongly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(_run: Run, count: int, _labels: Tensor | None) -> Picked:
        return Picked(torch.zeros(count, dtype=torch.int64), None, torch.ones(count))

    monkeypatch.setattr(ToyRun, "pick", twice)
    with pytest.raises(SelectionError, match="must pick 10 ascending positions below 50"):
        choose()


def test_passes_and_batches_come_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    def note(_run: Run, number: int, rows: Rows) -> None:
        seen.append((number, int(rows.indices[0])))

    monkeypatch.setattr(ToyRun, "update", note)
    monkeypatch.setattr(
        ToyRun, "pick", lambda _run, count, _labels: Picked(torch.arange(count), None, torch.ones(count))
    )
    choose(DataLoader(TensorDataset(*points()), batch_size=8, shuffle=True))
    assert seen == [(number, start) for number in (0, 1) for start in range(0, 50, 8)]


@pytest.mark.parametrize(
    "method", [st.SAGE(), st.EL2N(), st.GraNd(), st.Herding(), st.KCenter(), st.GradMatch(), st.Random()], ids=repr
)
def test_every_method_of_the_library_runs(method: Any) -> None:
    selection = st.select_subset(net(), points(), CROSS_ENTROPY, fraction=0.3, method=method, batch_size=8)
    assert len(selection) == 15
    assert float(selection.weights.mean()) == pytest.approx(1.0, abs=1e-5)
    again = st.select_subset(
        net(), DataLoader(TensorDataset(*points()), batch_size=8, shuffle=True), CROSS_ENTROPY, count=15, method=method
    )
    assert torch.equal(again.indices, selection.indices)
