"""A selection that is stopped and continued ends bit for bit as one that never was."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import steepest as st
from selecting import CROSS_ENTROPY, Toy, ToyRun, net, points
from steepest.errors import InvalidOptionError, OutputError, SelectionError
from steepest.selection import Progress


def choose(checkpoint: Path | None, data: Any = None, **options: Any) -> st.Selection:
    options = {"fraction": 0.2, "method": Toy(), "batch_size": 8, "model": net(), "loss_fn": CROSS_ENTROPY} | options
    model, loss_fn = options.pop("model"), options.pop("loss_fn")
    return st.select_subset(model, points() if data is None else data, loss_fn, checkpoint=checkpoint, **options)


def interrupt_after(batches: int, kind: str = "batch") -> Callable[[Progress], None]:
    done = 0

    def progress(step: Progress) -> None:
        nonlocal done
        done += step.kind == kind
        if done == batches:
            raise KeyboardInterrupt

    return progress


def same(one: st.Selection, other: st.Selection) -> None:
    assert torch.equal(one.indices, other.indices)
    assert one.scores is not None
    assert other.scores is not None
    assert torch.equal(one.scores, other.scores)
    assert torch.equal(one.weights, other.weights)
    assert one.labels is not None
    assert other.labels is not None
    assert torch.equal(one.labels, other.labels)
    assert (one.fingerprint, one.model_hash, one.options) == (other.fingerprint, other.model_hash, other.options)
    assert one.report.mean_cosine == other.report.mean_cosine


@pytest.mark.parametrize("batches", range(1, 15))
def test_a_continued_selection_is_bit_identical_wherever_it_stopped(batches: int, tmp_path: Path) -> None:
    file = tmp_path / "selection.checkpoint"
    with pytest.raises(KeyboardInterrupt):
        choose(file, progress=interrupt_after(batches))
    assert file.exists()
    told: list[Progress] = []
    continued = choose(file, progress=told.append)
    assert sum(step.kind == "batch" for step in told) == 14 - batches
    same(continued, choose(None))
    assert not list(tmp_path.iterdir())


def test_a_selection_can_stop_after_every_batch(tmp_path: Path) -> None:
    for _ in range(14):
        with pytest.raises(KeyboardInterrupt):
            choose(tmp_path / "c", progress=interrupt_after(1))
    same(choose(tmp_path / "c"), choose(None))


@pytest.mark.parametrize(
    "method",
    [st.SAGE(sketch_size=4), st.SAGE(sketch_size=4, scope="all"), st.EL2N(), st.GraNd(), st.Herding(), st.KCenter(),
     st.GradMatch()],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("batches", [1, 5, 7])
def test_the_methods_of_the_library_are_continued_bit_for_bit(method: Any, batches: int, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        choose(tmp_path / "c", method=method, progress=interrupt_after(batches))
    continued, whole = choose(tmp_path / "c", method=method), choose(None, method=method)
    assert torch.equal(continued.indices, whole.indices)
    assert continued.report.numbers == whole.report.numbers
    if whole.scores is not None:
        assert continued.scores is not None
        assert torch.equal(continued.scores.nan_to_num(7.0), whole.scores.nan_to_num(7.0))


def test_a_stop_in_the_review_repeats_no_pass(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        choose(tmp_path / "c", progress=interrupt_after(1, "review"))
    told: list[Progress] = []
    same(choose(tmp_path / "c", progress=told.append), choose(None))
    assert {step.kind for step in told} == {"review"}


def test_a_method_without_passes_continues_too(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        choose(tmp_path / "c", method=st.Random(), progress=interrupt_after(3))
    continued, whole = choose(tmp_path / "c", method=st.Random()), choose(None, method=st.Random())
    assert torch.equal(continued.indices, whole.indices)
    assert continued.fingerprint == whole.fingerprint


def test_a_signal_within_a_batch_waits_for_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update = ToyRun.update

    def interrupted(run: ToyRun, number: int, rows: Any) -> None:
        if number == 1 and int(rows.indices[0]) == 16 and not (tmp_path / "c").exists():
            os.kill(os.getpid(), signal.SIGINT)
        update(run, number, rows)

    with monkeypatch.context() as patch:
        patch.setattr(ToyRun, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            choose(tmp_path / "c")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    state = torch.load(tmp_path / "c", weights_only=True)["state"]
    assert (state["number"], state["batch"], len(state["run"]["scores"])) == (1, 3, 3)
    same(choose(tmp_path / "c"), choose(None))


def test_an_interrupt_within_an_update_leaves_the_last_whole_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = ToyRun.update

    def torn(run: ToyRun, number: int, rows: Any) -> None:
        update(run, number, rows)
        if number == 1 and int(rows.indices[0]) == 16:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ToyRun, "update", torn)
        with pytest.raises(KeyboardInterrupt):
            choose(tmp_path / "c", checkpoint_every=0.0)
    state = torch.load(tmp_path / "c", weights_only=True)["state"]
    assert (state["number"], state["batch"], len(state["run"]["scores"])) == (1, 2, 2)
    same(choose(tmp_path / "c"), choose(None))


def test_the_checkpoint_is_written_as_often_as_asked(tmp_path: Path) -> None:
    found: list[bool] = []
    choose(tmp_path / "c", progress=lambda step: found.append((tmp_path / "c").exists()), checkpoint_every=1e6)
    assert not any(found[:14])
    found.clear()
    choose(tmp_path / "c", progress=lambda step: found.append((tmp_path / "c").exists()), checkpoint_every=0.0)
    assert all(found[1:])


def test_the_number_to_keep_may_change(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        choose(tmp_path / "c", progress=interrupt_after(9))
    same(choose(tmp_path / "c", fraction=None, count=20), choose(None, fraction=None, count=20))


class Other(Dataset[tuple[Tensor, Tensor]]):
    """Fifty points, the second batch of which is not what it was."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = points()
        return x[index] + (8 <= index < 16), y[index]


def other_model() -> torch.nn.Module:
    model = net()
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-6
    return model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": other_model()}, "its model was '.*' and is '"),
        ({"method": Toy(passes=3)}, r"its options was \{.*'passes': 2.*\} and is \{.*'passes': 3"),
        ({"method": st.EL2N()}, "its method was 'toy' and is 'el2n'"),
        ({"batch_size": 16}, "its batch size was 8 and is 16"),
        ({"data": (points()[0][:49], points()[1][:49])}, "its number of samples was 50 and is 49"),
        ({"data": (points()[0] + 1, points()[1])}, "its data were another: the first batch differs"),
        ({"labels": torch.zeros(50, dtype=torch.int64)}, "its data were another: the first batch differs"),
        ({"loss_fn": lambda o, t: 2 * CROSS_ENTROPY(o, t)}, "its loss function was another: the losses"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_and_kept(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        choose(file, progress=interrupt_after(3))
    before = file.read_bytes()
    with pytest.raises(SelectionError, match=f"{message}.*delete it to begin anew"):
        choose(file, **options)
    assert file.read_bytes() == before


def test_data_that_changed_beyond_the_first_batch_are_found_by_the_next_pass(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        choose(tmp_path / "c", progress=interrupt_after(3))
    with pytest.raises(SelectionError, match="the data changed between passes"):
        choose(tmp_path / "c", DataLoader(Other(), batch_size=8), batch_size=None)


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        choose(file, progress=interrupt_after(3))
    content = torch.load(file, weights_only=True)
    content["identity"]["torch"] = "1.0"
    torch.save(content, file)
    with pytest.raises(SelectionError, match=r"its torch was '1\.0' and is "):
        choose(file)
    content["format"] = 99
    torch.save(content, file)
    with pytest.raises(SelectionError, match="has selection checkpoint format 99, this steepest reads 1"):
        choose(file)


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "flipped", "foreign", "incomplete"])
def test_a_damaged_checkpoint_is_refused_by_name(damage: str, tmp_path: Path) -> None:
    file = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        choose(file, progress=interrupt_after(9))
    raw = bytearray(file.read_bytes())
    if damage == "foreign":
        torch.save([1, 2], file)
    elif damage == "incomplete":
        content = torch.load(file, weights_only=True)
        del content["state"]["run"]
        torch.save(content, file)
    else:
        raw[raw.index(b"toy")] ^= 1
        texts = {"empty": b"", "text": b"no checkpoint", "truncated": bytes(raw[:-40]), "flipped": bytes(raw)}
        file.write_bytes(texts[damage])
    with pytest.raises(
        SelectionError, match=r"c .*(cannot be read|damaged|format|not complete).*delete it to begin anew"
    ):
        choose(file)


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "none" / "c"):
        with pytest.raises(SelectionError, match="cannot be written: name a file in a folder that can be"):
            choose(place)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        choose(file, progress=interrupt_after(3))
    before = file.read_bytes()

    def killed(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("steepest._files.os.fsync", killed)
        with pytest.raises(OutputError, match="No space left on device"):
            choose(file, checkpoint_every=0.0)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]
    same(choose(file), choose(None))


def test_an_option_that_is_refused_leaves_the_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        choose(file, progress=interrupt_after(3))
    with pytest.raises(InvalidOptionError, match="count=51"):
        choose(file, fraction=None, count=51)
    assert file.exists()


def test_data_without_a_length_are_continued(tmp_path: Path) -> None:
    x, y = points()
    batches = list(zip(x.split(8), y.split(8), strict=True))
    for stop in (3, 4, 5):
        with pytest.raises(KeyboardInterrupt):
            choose(tmp_path / "c", batches, batch_size=None, progress=interrupt_after(stop))
    same(choose(tmp_path / "c", batches, batch_size=None), choose(None, batches, batch_size=None))
