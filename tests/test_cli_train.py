"""`steepest train`: one run, its files, interrupting and going on, files of settings, the user's own data and code."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from made_checkpoints import tensors_of
from steepest.cli import run
from steepest.distributed.checkpoint.folders import complete_folders
from steepest.training.records import RecordStore, RunRecord

STEEPEST = [sys.executable, "-m", "steepest.cli"]
SMALL = ["train", "diabetes", "-o", "adam", "--epochs", "3"]
LONG = ["train", "diabetes", "-o", "sven", "--epochs", "150", "--checkpoint-every", "0.02"]

Capsys = pytest.CaptureFixture[str]


def numbers(out: Path) -> tuple[object, ...]:
    (record,) = RecordStore(out / "records").read_all()
    history = [(p.epoch, p.steps, p.train_loss, p.val_loss, p.diagnostics, p.series) for p in record.history]
    return record.status, record.final, record.fingerprint, history


def weights(out: Path) -> dict[str, torch.Tensor]:
    return dict(torch.load(out / "model.pt", weights_only=True)["state_dict"])


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_a_run_leaves_record_model_and_report(tmp_path: Path, capsys: Capsys) -> None:
    assert run([*SMALL, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert {path.name for path in tmp_path.iterdir()} == {"records", "model.pt", "report.html"}
    assert "epoch" in shown.err
    for word in ("Adam", "val loss", str(tmp_path / "model.pt"), str(tmp_path / "report.html")):
        assert word in shown.out
    (record,) = RecordStore(tmp_path / "records").read_all()
    assert record.status == "finished"
    assert record.samples == (266, 88, 88)


def test_a_run_that_is_recorded_is_not_repeated_unasked(tmp_path: Path, capsys: Capsys) -> None:
    out = ["--out", str(tmp_path)]
    assert run([*SMALL, *out]) == 0
    before = (RecordStore(tmp_path / "records").read_all(), weights(tmp_path))
    capsys.readouterr()
    assert run([*SMALL, *out]) == 2
    assert "--resume shows it, --fresh makes the run again" in capsys.readouterr().err
    assert run([*SMALL, *out, "--resume"]) == 0
    assert "finished already" in capsys.readouterr().err
    assert RecordStore(tmp_path / "records").read_all() == before[0]
    assert run([*SMALL, *out, "--fresh"]) == 0
    assert same(weights(tmp_path), before[1])
    assert numbers(tmp_path)[0] == "finished"


def test_json_is_all_there_is_on_standard_output(tmp_path: Path, capsys: Capsys) -> None:
    assert run([*SMALL, "--out", str(tmp_path), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["tasks"][0]["rows"][0]["optimizer"] == "adam"
    assert all(Path(path).exists() for path in data["files"].values())


def test_a_run_that_diverges_or_fails_is_no_success(tmp_path: Path, capsys: Capsys) -> None:
    assert run(["train", "digits", "-o", "sgd", "--set", "lr=1e12", "--epochs", "1", "--out", str(tmp_path / "a")]) == 1
    assert "diverged" in capsys.readouterr().out
    failing = ["train", "digits", "--set", "sven.samples_per_row=7", "--epochs", "1", "--out", str(tmp_path / "b")]
    assert run(failing) == 1
    assert "no multiple of samples_per_row=7" in capsys.readouterr().err
    assert not list(tmp_path.rglob("model.pt"))


def test_a_file_of_settings_and_flags_over_it(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(
        'task = "diabetes"\noptimizer = "sgd"\nepochs = 2\nout = "here"\n[options]\nlr = 0.02\nmomentum = 0.5\n'
    )
    arguments = ["train", "--config", str(tmp_path / "run.toml"), "--set", "lr=0.03", "--out", str(tmp_path / "out")]
    assert run(arguments) == 0
    (record,) = RecordStore(tmp_path / "out" / "records").read_all()
    assert (record.options["lr"], record.options["momentum"], record.epochs) == (0.03, 0.5, 2)
    assert "set by the user: lr, momentum" in record.options_source


def test_a_table_of_ones_own(tmp_path: Path, capsys: Capsys) -> None:
    rows = [f"{i % 7},{'north' if i % 3 else 'south'},{(i % 7) ** 2 + i % 3}.5" for i in range(120)]
    table = tmp_path / "houses & <b>.csv"
    table.write_text("\n".join(["rooms,side,price", *rows]))
    arguments = ["--data", str(table), "--target", "price", "--epochs", "4", "--out", str(tmp_path / "out")]
    assert run(["train", "-o", "adam", "--set", "lr=0.01", *arguments]) == 0
    (record,) = RecordStore(tmp_path / "out" / "records").read_all()
    assert record.problem.kind == "regression"
    assert any("side" in note for note in record.problem.notes)
    assert record.problem.digest
    assert "regression" in capsys.readouterr().out


def test_a_run_on_a_subset_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["train", "diabetes", "-o", "adam", "--epochs", "3", "--select", "random:0.5:every=1"]) == 0
    (record,) = RecordStore(Path("runs/train/diabetes-adam-random-0.5-every=1/records")).read_all()
    assert (record.status, record.select, record.steps) == ("finished", "random:0.5:every=1", 24)
    assert [item.epoch for item in record.selections] == [2, 3]


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_run_that_selects_goes_on_and_ends_bit_identical(tmp_path: Path) -> None:
    often = [*LONG, "--select", "sage:0.5:every=1:warmup=0"]
    assert run([*often, "--epochs", "30", "--out", str(tmp_path / "whole")]) == 0
    process = start([*often, "--epochs", "30"], tmp_path / "cut")
    try:
        wait_for_checkpoint(tmp_path / "cut")
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert run(["train", "--resume", "--out", str(tmp_path / "cut")]) == 0
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


CODE = """
from torch import nn
def net(in_features, out_features):
    return nn.Sequential(nn.Linear(in_features, 9), nn.ReLU(), nn.Linear(9, out_features))
"""


def test_code_of_ones_own_in_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "my_net_code.py").write_text(CODE)
    arguments = ["compare", "diabetes", "-o", "sgd", "--seeds", "1", "--epochs", "1", "--model", "my_net_code:net"]
    done = subprocess.run([*STEEPEST, *arguments, "--out", "out"], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    (record,) = RecordStore(tmp_path / "out" / "records").read_all()
    assert record.status == "finished", record.error
    assert record.num_parameters == 10 * 9 + 9 + 9 + 1
    assert record.problem.model == "my_net_code:net"


def start(arguments: list[str], out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*STEEPEST, *arguments, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_checkpoint(out: Path) -> None:
    deadline = time.monotonic() + 60
    while not complete_folders(out / "checkpoints"):
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an interrupted run must end with."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert run([*LONG, "--out", str(out)]) == 0
    return out


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_goes_on_and_ends_bit_identical(
    stop: signal.Signals, tmp_path: Path, whole: Path, capsys: Capsys
) -> None:
    out = tmp_path / "cut"
    process = start(LONG, out)
    try:
        wait_for_checkpoint(out)
        process.send_signal(stop)
        output, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert not list(out.glob("records/*.jsonl"))
    if stop != signal.SIGKILL:
        assert process.returncode == 130, error
        assert "Traceback" not in error
        assert f"steepest train --resume --out {out}" in error
        assert output == ""
    assert run([*LONG, "--out", str(out)]) == 2
    assert "--resume goes on with it" in capsys.readouterr().err
    assert run(["train", "--resume", "--out", str(out)]) == 0
    assert "going on from" in capsys.readouterr().err
    assert numbers(out) == numbers(whole)
    assert same(weights(out), weights(whole))
    assert not (out / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="kill -9 of POSIX")
def test_twenty_kills_at_random_moments_of_a_run(tmp_path: Path, whole: Path) -> None:
    moments, out, stopped = random.Random(0), tmp_path / "cut", 0
    for _ in range(20):
        process = start([*LONG, "--resume"], out)
        # From before the first import to after the end of a short run.
        time.sleep(moments.uniform(0.2, 6.0))
        stopped += process.poll() is None
        process.kill()
        process.communicate()
        for path in out.glob("records/*.jsonl"):
            RunRecord.from_line(path.read_text(), str(path))
        for step in complete_folders(out / "checkpoints"):
            tensors_of(step)
    assert stopped >= 5
    assert run([*LONG, "--resume", "--out", str(out)]) == 0
    assert numbers(out) == numbers(whole)
    assert same(weights(out), weights(whole))
    assert not list(out.rglob("*.tmp"))


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
def test_a_disk_that_is_full_is_one_line_and_earlier_files_stay(tmp_path: Path) -> None:
    assert run([*SMALL, "--out", str(tmp_path)]) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    # A limit on the size of files stands in for a disk without room: records are larger than 2,000 bytes.
    script = (
        "import resource, sys\nfrom steepest.cli import run\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\nsys.exit(run(sys.argv[1:]))"
    )
    for command in (["train"], ["compare"]):
        arguments = [*command, "diabetes", "-o", "sgd", "--epochs", "60", "--out", str(tmp_path)]
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert "File too large" in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
        assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before
