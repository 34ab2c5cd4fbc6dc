"""Records: complete or absent, readable or refused by name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from made import make_record
from steepest.training.errors import OutputError, RecordError
from steepest.training.files import write_atomically
from steepest.training.records import SCHEMA, RecordStore, RunRecord
from steepest.training.spec import RunSpec

WRITER = """
import sys
from pathlib import Path
from made import make_record
from steepest.training.records import RecordStore
from steepest.training.spec import RunSpec

store = RecordStore(Path(sys.argv[1]))
print("ready", flush=True)
for seed in range(10**6):
    spec = RunSpec("toy_1d", "sgd", seed=seed % 50)
    store.write(spec, make_record(seed=seed % 50, epochs=400))
"""


def test_a_record_survives_the_round_trip() -> None:
    record = make_record(options={"lr": 0.1, "solver": {"type": "Damped", "damping": 0.1}, "betas": [0.9, 0.99]})
    line = record.to_line()
    assert line.count("\n") == 1
    assert RunRecord.from_line(line, "here") == record


def test_a_diverged_record_has_no_nan_in_its_json() -> None:
    record = make_record(status="diverged", final=None)
    assert "NaN" not in record.to_line()
    with pytest.raises(ValueError, match="not JSON compliant"):
        replace(record, seconds=float("nan")).to_line()


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_files_have_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    write_atomically(tmp_path / "atomic", "x")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def _drop(data: dict[str, object]) -> None:
    del data["seed"]


def _retype(data: dict[str, object]) -> None:
    data["seconds"] = "fast"


def _restatus(data: dict[str, object]) -> None:
    data["status"] = "perfect"


def _add(data: dict[str, object]) -> None:
    data["extra"] = 1


@pytest.mark.parametrize("damage", [_drop, _retype, _restatus, _add])
def test_a_field_that_is_missing_or_wrong_is_refused(damage: Callable[[dict[str, object]], None]) -> None:
    data = json.loads(make_record().to_line())
    damage(data)
    with pytest.raises(RecordError, match=r"x\.jsonl is no complete run record"):
        RunRecord.from_line(json.dumps(data), "x.jsonl")


@pytest.mark.parametrize("line", ["", "{", "[1]", '"text"', make_record().to_line()[:200]])
def test_text_that_is_no_record_is_refused(line: str) -> None:
    with pytest.raises(RecordError, match=r"x\.jsonl .* delete that file to have the run repeated"):
        RunRecord.from_line(line, "x.jsonl")


def test_another_schema_is_named() -> None:
    line = make_record().to_line().replace(f'"schema": {SCHEMA}', '"schema": 99')
    with pytest.raises(RecordError, match=f"schema 99, this steepest reads {SCHEMA}"):
        RunRecord.from_line(line, "x.jsonl")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    store, spec = RecordStore(tmp_path), RunSpec("toy_1d", "sgd")
    store.path(spec).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecordError, match="cannot be read"):
        store.read(spec)


def test_the_store_finds_a_run_by_everything_that_decides_it(tmp_path: Path) -> None:
    store, spec = RecordStore(tmp_path), RunSpec("toy_1d", "sgd", {"lr": 0.1}, seed=1, epochs=2)
    assert store.read(spec) is None
    record = make_record()
    store.write(spec, record)
    assert store.read(spec) == record
    assert store.read(replace(spec, options={"lr": 0.2})) is None
    assert store.read(replace(spec, epochs=3)) is None
    assert store.read_all() == [record]


def test_a_failed_write_leaves_the_old_content_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_atomically(path, "old")

    def full_disk(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("steepest._files.os.fsync", full_disk)
    with pytest.raises(OutputError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no kill -9")
def test_kill_9_during_writes_leaves_only_complete_records(tmp_path: Path) -> None:
    helpers = str(Path(__file__).parents[1])
    for wait in (0.01, 0.03, 0.05, 0.08, 0.13):
        process = subprocess.Popen(
            [sys.executable, "-c", f"import sys; sys.path.insert(0, {helpers!r})\n{WRITER}", str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        with process.stdout:
            assert process.stdout.readline() == "ready\n"
            time.sleep(wait)
            process.kill()
            process.wait()
        records = [RunRecord.from_line(path.read_text(), str(path)) for path in tmp_path.glob("*.jsonl")]
        assert all(len(record.history) == 401 for record in records)
    assert records
    RecordStore(tmp_path).prepare()
    assert not list(tmp_path.glob(".*")), "temporary files of killed writers are removed"
