"""A selection in use: subsets, samplers, files, and what it says of itself."""

import errno
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import steepest as st
from selecting import CROSS_ENTROPY, Toy, net, points
from steepest.errors import InvalidOptionError, OutputError, SelectionError
from steepest.selection import SelectionReport

DATA = points()


def choose(data: Any = None, **options: Any) -> st.Selection:
    options = {"fraction": 0.2, "method": Toy(), "batch_size": 8} | options
    return st.select_subset(net(), DATA if data is None else data, CROSS_ENTROPY, **options)


class Plain(Dataset[tuple[Tensor, Tensor]]):
    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return DATA[0][index], DATA[1][index]


def same(one: st.Selection, other: st.Selection) -> None:
    for name in ("indices", "scores", "weights", "labels"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None)
        assert a is None or (torch.equal(a, b) and a.dtype == b.dtype)
    for name in ("method", "options", "num_samples", "fingerprint", "model_hash", "report"):
        assert getattr(one, name) == getattr(other, name)


@pytest.mark.parametrize("data", [DATA, TensorDataset(*DATA), Plain(), DataLoader(Plain(), batch_size=7, shuffle=True)])
def test_a_subset_holds_the_kept_samples(data: Any) -> None:
    selection = choose()
    subset = selection.subset(data, verify=isinstance(data, (tuple, TensorDataset)))
    assert len(subset) == len(selection) == 10
    for (x, y), index in zip(subset, selection.indices.tolist(), strict=True):
        assert torch.equal(x, DATA[0][index])
        assert y == DATA[1][index]


def test_the_fingerprint_does_not_depend_on_the_batch_size_of_the_check() -> None:
    selection = choose(Plain(), batch_size=13)
    assert len(selection.subset(DataLoader(Plain(), batch_size=3))) == 10
    assert len(selection.subset(Plain())) == 10


def test_other_data_are_refused() -> None:
    selection = choose()
    x, y = DATA
    changed = x.clone()
    changed[49, 3] += 1e-6
    for other in [(changed, y), (x, y.flip(0)), (x.double(), y), (x.flip(0), y)]:
        with pytest.raises(SelectionError, match="not those that the selection was made from: their hash is"):
            selection.subset(other)
    assert len(selection.subset((changed, y), verify=False)) == 10


@pytest.mark.parametrize("verify", [False, True])
def test_data_of_another_length_are_refused(verify: bool) -> None:
    x, y = DATA
    with pytest.raises(SelectionError, match="the data have 49 samples, the selection was made from 50"):
        choose().subset((x[:49], y[:49]), verify=verify)


def test_data_without_positions_have_no_subset() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(Plain()[i] for i in range(50))

    selection = choose(Stream())
    with pytest.raises(SelectionError, match="Stream has no samples by position"):
        selection.subset(Stream())


def test_labels_of_the_users_own_are_remembered_for_the_check() -> None:
    selection = choose(labels=torch.arange(50) % 2)
    assert len(selection.subset(DATA)) == 10


@pytest.mark.parametrize("name", ["subset", "subset.npz", "subset.json", "subset.v1", "subset.v1.npz"])
def test_a_selection_survives_its_file(name: str, tmp_path: Path) -> None:
    selection = choose()
    path = selection.save(tmp_path / name)
    stem = name.removesuffix(".npz").removesuffix(".json")
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"{stem}.json", f"{stem}.npz"]
    assert path == tmp_path / f"{stem}.npz"
    for given in (tmp_path / name, str(path)):
        same(st.Selection.load(given), selection)
    loaded = st.Selection.load(path, data=DATA)
    assert len(loaded.subset(DATA)) == 10


def test_a_selection_without_scores_and_labels_survives_too(tmp_path: Path) -> None:
    selection = st.select_subset(None, (DATA[0],), count=5, method=st.Random(), review=False)
    assert selection.scores is selection.labels is None
    selection.save(tmp_path / "s")
    same(st.Selection.load(tmp_path / "s"), selection)


def test_loading_refuses_other_data(tmp_path: Path) -> None:
    choose().save(tmp_path / "s")
    with pytest.raises(SelectionError, match="not those that the selection was made from"):
        st.Selection.load(tmp_path / "s", data=(DATA[0] + 1, DATA[1]))


def test_the_words_beside_the_file_are_json_for_others(tmp_path: Path) -> None:
    st.select_subset(None, DATA, fraction=0.2, method=st.Random(seed=4)).save(tmp_path / "s")
    content = json.loads((tmp_path / "s.json").read_text())
    assert content["method"] == "random"
    assert (content["seed"], content["fraction"], content["kept"], content["num_samples"]) == (4, 0.2, 10, 50)
    assert content["versions"]["torch"]
    assert content["report"]["class_counts"][0][0] == 0
    (tmp_path / "s.json").unlink()
    assert len(st.Selection.load(tmp_path / "s")) == 10


def test_nothing_in_the_file_is_pickled(tmp_path: Path) -> None:
    path = choose().save(tmp_path / "s")
    with np.load(path, allow_pickle=False) as file:
        assert sorted(file.files) == ["about", "indices", "labels", "scores", "weights"]
        assert all(file[name].dtype != object for name in file.files)


def rewritten(path: Path, **changes: Any) -> None:
    with np.load(path) as file:
        content = {name: file[name] for name in file.files} | changes
    buffer = io.BytesIO()
    np.savez(buffer, **{name: array for name, array in content.items() if array is not None})
    path.write_bytes(buffer.getvalue())


def words(path: Path, **changes: Any) -> Any:
    with np.load(path) as file:
        about = json.loads(file["about"].tobytes())
    return np.frombuffer(json.dumps(about | changes).encode(), dtype=np.uint8)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "does not exist"),
        ("empty", "cannot be read as a selection"),
        ("text", "cannot be read as a selection"),
        ("truncated", "cannot be read as a selection"),
        ("flipped", "cannot be read as a selection"),
        ("folder", "cannot be read as a selection"),
        ("one array", "is one array and no selection"),
        ("foreign", "is no selection, it holds x"),
        ("zip", "is no selection"),
        ("pickled", "cannot be read as a selection"),
        ("encrypted", "cannot be read as a selection .*encrypted"),
        ("newer", "has selection format 2, this steepest reads 1: read it with the version that wrote it"),
        ("no json", "cannot be read as a selection"),
        ("list", "has selection format 'list'"),
        ("no indices", "its indices are missing"),
        ("descending", "its indices are not ascending positions in 50 samples"),
        ("beyond", "its indices are not ascending positions in 50 samples"),
        ("short weights", "its weights are missing or of another type or number"),
        ("double scores", "its scores are missing or of another type or number"),
        ("no method", "its method is missing or wrong"),
        ("report", "its report is missing"),
        ("odd report", "its report cannot be read"),
    ],
)
def test_files_that_are_no_selection_are_refused_by_name(damage: str, message: str, tmp_path: Path) -> None:
    path = choose().save(tmp_path / "subset")
    raw = path.read_bytes()
    with np.load(path) as file:
        arrays = dict(file)
    changes: dict[str, Any] = {
        "newer": {"about": words(path, format=2)},
        "no json": {"about": np.frombuffer(b"{", dtype=np.uint8)},
        "list": {"about": np.frombuffer(b"[]", dtype=np.uint8)},
        "no indices": {"indices": None},
        "descending": {"indices": arrays["indices"][::-1]},
        "beyond": {"indices": arrays["indices"] + 40},
        "short weights": {"weights": arrays["weights"][1:]},
        "double scores": {"scores": arrays["scores"].astype(np.float64)},
        "pickled": {"scores": np.array([{}], dtype=object)},
        "no method": {"about": words(path, method=None)},
        "report": {"about": words(path, report=None)},
        "odd report": {"about": words(path, report={"notes": []})},
    }
    if damage in changes:
        rewritten(path, **changes[damage])
    elif damage == "one array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif damage == "foreign":
        np.savez(path, x=np.zeros(3))
    elif damage == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "nothing")
    elif damage == "encrypted":
        raw = bytearray(raw)
        raw[6] |= 1  # the flag of the first entry, and again where the archive lists it
        raw[raw.index(b"PK\x01\x02") + 8] |= 1
        path.write_bytes(raw)
    elif damage == "flipped":
        place = raw.index(arrays["indices"].tobytes()) + 3
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
    elif damage in {"missing", "folder"}:
        path.unlink()
        if damage == "folder":
            path.mkdir()
    else:
        path.write_bytes({"empty": b"", "text": b"indices: 1 2 3", "truncated": raw[: len(raw) // 2]}[damage])
    with pytest.raises(SelectionError, match=message) as caught:
        st.Selection.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("moment", ["fsync", "rename"])
def test_a_kill_while_saving_leaves_the_file_before(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = choose(), choose(fraction=0.5)
    first.save(tmp_path / "s")

    def killed(*_arguments: object) -> None:
        raise SystemExit(137)

    target = "steepest._files.os.fsync" if moment == "fsync" else "pathlib.Path.replace"
    with monkeypatch.context() as patch:
        patch.setattr(target, killed)
        with pytest.raises(SystemExit):
            second.save(tmp_path / "s")
    same(st.Selection.load(tmp_path / "s"), first)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["s.json", "s.npz"]


def test_a_kill_between_the_two_files_leaves_a_readable_selection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = choose(), choose(fraction=0.5)
    first.save(tmp_path / "s")
    replace, done = Path.replace, []

    def killed(path: Path, target: Path) -> Path:
        if done:
            raise SystemExit(137)
        done.append(target)
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(SystemExit):
            second.save(tmp_path / "s")
    same(st.Selection.load(tmp_path / "s"), second)


def test_a_full_disk_is_one_clear_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("steepest._files.os.fsync", full)
    with pytest.raises(OutputError, match=r"s\.npz cannot be written \(No space left on device\)"):
        choose().save(tmp_path / "s")


def test_wrong_labels_are_counted() -> None:
    selection = choose()
    wrong = torch.zeros(50, dtype=torch.bool)
    wrong[selection.indices[:2]] = True
    wrong[[i for i in range(50) if i not in set(selection.indices.tolist())][:8]] = True
    assert selection.wrong_dropped(wrong) == {
        "wrong": 10, "wrong_kept": 2, "share": 0.2, "share_kept": 0.2, "dropped": 0.8,
    }  # fmt: skip
    none = selection.wrong_dropped(torch.zeros(50, dtype=torch.bool))
    assert none["wrong"] == 0
    assert none["dropped"] != none["dropped"]
    for mask in (wrong[:49], wrong.long(), [True] * 50):
        with pytest.raises(SelectionError, match=r"give a bool tensor of shape \(50,\)"):
            selection.wrong_dropped(mask)  # type: ignore[arg-type]


def test_break_even_counts_epochs_of_the_time_that_is_saved() -> None:
    report = SelectionReport(seconds=30.0, review_seconds=99.0, kept=25, num_samples=100)
    assert report.break_even(epoch_seconds=10.0) == pytest.approx(4.0)
    assert SelectionReport(seconds=30.0, kept=100, num_samples=100).break_even(10.0) == float("inf")
    with pytest.raises(InvalidOptionError, match=r"epoch_seconds=0: give a finite number in \(0"):
        report.break_even(0)


def test_a_report_reads_as_sentences() -> None:
    text = str(choose().report)
    assert text.startswith("kept 10 of 50 samples in ")
    for part in ("(2 passes with the model)", "kept per class: 0: ", "mean cosine between kept", "note: a note of the"):
        assert part in text
    many = SelectionReport(seconds=3700.0, class_counts={name: (name % 2, 5) for name in range(30)})
    assert "in 1 h 1 min" in str(many)
    assert "classes: 15 of 30 kept" in str(many)


def test_a_selection_shows_itself_in_one_line() -> None:
    assert repr(choose()) == "Selection(10 of 50 samples, method='toy')"
    assert choose().fraction == 0.2


def test_a_subset_of_arrays_is_made_as_the_selection_was() -> None:
    arrays = tuple(part.numpy() for part in DATA)
    selection = choose(arrays)
    for options in ({}, {"verify": False}):
        subset = selection.subset(arrays, **options)
        assert torch.equal(torch.stack([x for x, _ in subset]), DATA[0][selection.indices])


def test_batches_have_no_samples_by_position() -> None:
    batches = list(zip(DATA[0].split(8), DATA[1].split(8), strict=True))
    selection = choose(batches, batch_size=None)
    with pytest.raises(SelectionError, match="a list of 7 batches has no samples by position"):
        selection.subset(batches)


@pytest.mark.parametrize("path", ["", ".", "/", "..", "a/..", "a\0b", b"a", None, 3])
def test_what_is_the_path_of_no_file_is_refused(path: Any) -> None:
    for name, use in (
        ("path", choose().save),
        ("path", st.Selection.load),
        ("checkpoint", lambda path: choose(checkpoint=path)),
    ):
        if (name, path) == ("checkpoint", None):  # there, None is no checkpoint
            continue
        with pytest.raises(InvalidOptionError, match=f"^{name}=.* names no file: give the path of one"):
            use(path)


def test_nobody_is_advised_to_unpickle_what_is_no_selection(tmp_path: Path) -> None:
    (tmp_path / "subset.npz").write_bytes(b"anything else")
    with pytest.raises(SelectionError, match="it is no NPZ file") as caught:
        st.Selection.load(tmp_path / "subset")
    assert "pickle" not in str(caught.value)


def test_a_path_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        choose().save(tmp_path / "file" / "subset.npz")
