"""A selection that is stopped and continued ends bit for bit as one that never was."""

import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import steepest as st
from made_checkpoints import change_manifest, reseal
from selecting import CROSS_ENTROPY, Toy, ToyRun, kept_in, net, points
from steepest.distributed.checkpoint.folders import complete_folders
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


def stood(folder: Path) -> tuple[int, int, int]:
    state = kept_in(folder)
    (share,) = state["shares"]
    return state["common"]["number"], share["batch"], len(share["run"]["scores"])


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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
    assert stood(tmp_path / "c") == (1, 3, 3)
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
    assert stood(tmp_path / "c") == (1, 2, 2)
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
    before = bytes_in(file)
    with pytest.raises(SelectionError, match=f"{message}.*delete it to begin anew"):
        choose(file, **options)
    assert bytes_in(file) == before


def test_data_that_changed_beyond_the_first_batch_are_found_by_the_next_pass(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        choose(tmp_path / "c", progress=interrupt_after(3))
    with pytest.raises(SelectionError, match="the data changed between passes"):
        choose(tmp_path / "c", DataLoader(Other(), batch_size=8), batch_size=None)


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        choose(file, progress=interrupt_after(3))
    (step,) = complete_folders(file)
    change_manifest(step, lambda content: content["identity"].update(torch="1.0"))
    with pytest.raises(SelectionError, match=r"its torch was '1\.0' and is "):
        choose(file)
    change_manifest(step, lambda content: content.update(kind="selection 3"))
    with pytest.raises(SelectionError, match="is a checkpoint of 'selection 3', and this steepest reads 'selection 2'"):
        choose(file)
    change_manifest(step, lambda content: content.update(format=99))
    with pytest.raises(SelectionError, match=r"has checkpoint format 99, this steepest reads \d+; delete it to begin"):
        choose(file)


def flipped(step: Path) -> None:
    (data,) = step.glob("*.distcp")
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 2] ^= 1
    data.write_bytes(raw)


def cut(step: Path) -> None:
    (data,) = step.glob("*.distcp")
    data.write_bytes(data.read_bytes()[:-40])


def forged(step: Path) -> None:
    (step / ".metadata").write_bytes(pickle.dumps(Path.cwd))
    reseal(step)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (flipped, "is damaged: its SHA-256 is not the one"),
    "cut": (cut, "is damaged: it has"),
    "forged": (forged, r"\.metadata cannot be read \(it asks for"),
    "no manifest": (lambda step: (step / "manifest.json").unlink(), "manifest.json cannot be read"),
    "text": (lambda step: (step / "manifest.json").write_text("no checkpoint"), "manifest.json cannot be read"),
    "empty": (lambda step: (step / "manifest.json").write_text(""), "manifest.json cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(damage: str, tmp_path: Path) -> None:
    file, (harm, message) = tmp_path / "c", DAMAGE[damage]
    with pytest.raises(KeyboardInterrupt):
        choose(file, progress=interrupt_after(9), checkpoint_every=0.0)
    older, newer = complete_folders(file)
    harm(newer)
    told: list[Progress] = []
    with pytest.warns(UserWarning, match=f"{newer.name}.*{message}.*going on from the one before, .*{older.name}"):
        continued = choose(file, progress=told.append)
    assert next((step.pass_number, step.batch) for step in told if step.kind == "batch") == (1, 2)
    same(continued, choose(None))
    assert not file.exists()


def test_a_damaged_checkpoint_never_drives_out_a_whole_one(tmp_path: Path) -> None:
    file = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        choose(file, progress=interrupt_after(9), checkpoint_every=0.0)
    flipped(complete_folders(file)[-1])
    with pytest.warns(UserWarning, match="going on from"), pytest.raises(KeyboardInterrupt):
        choose(file, progress=interrupt_after(1))
    flipped(complete_folders(file)[-1])
    with pytest.warns(UserWarning, match="going on from"):
        same(choose(file), choose(None))


def test_a_selection_whose_checkpoints_are_all_damaged_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        choose(file, progress=interrupt_after(9), checkpoint_every=0.0)
    older, newer = complete_folders(file)
    for step in (older, newer):
        flipped(step)
    with pytest.raises(
        SelectionError, match=f"{newer.name}.*damaged.*{older.name}.*damaged.*; delete it to begin anew"
    ):
        choose(file)


def test_a_state_that_lacks_something_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        choose(file, progress=interrupt_after(9))
    (step,) = complete_folders(file)
    change_manifest(step, lambda content: content["state"]["shares"][0].pop("run"))
    with pytest.raises(SelectionError, match=r"is not complete \('run'\); .*delete it to begin anew"):
        choose(file)
    change_manifest(step, lambda content: content.pop("kind"))
    with pytest.raises(SelectionError, match="is a checkpoint of 'a run'"):
        choose(file)


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(SelectionError, match="cannot be written: name a folder of its own, within one that can be"):
        choose(tmp_path / "none" / "c")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SelectionError, match=r"with other things in it \(notes.txt\): name a folder of its own"):
        choose(tmp_path)
    assert (tmp_path / "notes.txt").exists()


@pytest.mark.parametrize("name", ["c", "c.0-of-2"])
def test_a_file_that_an_earlier_version_wrote_is_refused_and_kept(name: str, tmp_path: Path) -> None:
    torch.save({"format": 1}, tmp_path / name)
    with pytest.raises(SelectionError, match=f"{name} is a file, as earlier versions kept a selection.*delete it to"):
        choose(tmp_path / "c")
    assert (tmp_path / name).exists()


def test_an_empty_folder_may_be_the_place(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    same(choose(tmp_path / "c"), choose(None))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        choose(file, progress=interrupt_after(3))
    before = bytes_in(file)

    def killed(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("steepest.distributed.checkpoint.manifest.os.fsync", killed)
        with pytest.raises(OutputError, match="No space left on device"):
            choose(file, checkpoint_every=0.0)
    assert bytes_in(file) == before
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
