"""The command line: what it prints, how it fails, how it is interrupted."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from steepest import __version__
from steepest.cli import run
from steepest.training.records import RecordStore, RunRecord

SMALL = ["compare", "diabetes", "--optimizers", "sgd,adam", "--seeds", "2", "--epochs", "2"]
STEEPEST = [sys.executable, "-m", "steepest.cli"]

Capsys = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small comparison, made once."""
    out = tmp_path_factory.mktemp("runs") / "small"
    assert run([*SMALL, "--out", str(out)]) == 0
    return out


def results(folder: Path) -> dict[str, tuple[object, ...]]:
    """What must not depend on interruptions: the numbers of each run."""
    records = [RunRecord.from_line(path.read_text(), str(path)) for path in folder.glob("records/*.jsonl")]
    return {
        f"{record.task} {record.optimizer} {record.seed}": (
            record.final,
            record.fingerprint,
            *[(point.val_loss, point.train_loss) for point in record.history],
        )
        for record in records
    }


def test_a_comparison_leaves_records_tables_and_plots(compared: Path, capsys: Capsys) -> None:
    assert len(RecordStore(compared / "records").read_all()) == 4
    assert {path.name for path in compared.rglob("*.*") if path.suffix != ".jsonl"} == {
        "report.html",
        "summary.json",
        "summary.md",
        "diabetes.svg",
        "diabetes.png",
    }
    assert run([*SMALL, "--out", str(compared)]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("already recorded") == 4
    for word in (
        "SGD",
        "Adam",
        "val loss",
        "test R2",
        "2/2",
        str(compared / "summary.md"),
        str(compared / "report.html"),
    ):
        assert word in shown.out


def test_json_is_all_there_is_on_standard_output(compared: Path, capsys: Capsys) -> None:
    assert run([*SMALL, "--out", str(compared), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [row["optimizer"] for row in data["tasks"][0]["rows"]] == ["sgd", "adam"]
    assert all(Path(path).exists() for path in data["files"].values() if isinstance(path, str))


def test_a_goal_by_a_metric_goes_from_flag_and_file_to_the_result(
    compared: Path, tmp_path: Path, capsys: Capsys
) -> None:
    assert run([*SMALL, "--out", str(compared), "--goal-metric", "r2", "--goal", "-0.5", "--json"]) == 0
    goal = json.loads(capsys.readouterr().out)["tasks"][0]["goal"]
    assert (goal["metric"], goal["value"], goal["given"]) == ("r2", -0.5, True)
    file = tmp_path / "settings.toml"
    file.write_text('goal_metric = "r2"\n[goal]\ndiabetes = 0.125\n')
    assert run([*SMALL, "--out", str(compared), "--config", str(file)]) == 0
    assert "Goal: validation R2 0.125, given by the user." in capsys.readouterr().out
    assert run(["report", str(compared), "--out", str(tmp_path / "r.html"), "--goal-metric", "r2"]) == 0
    assert "final R2 of Adam's finished runs" in capsys.readouterr().out
    assert "Validation R2 against epochs" in (tmp_path / "r.html").read_text(encoding="utf-8")
    assert run(["report", str(compared), "--goal-metric", "r3"]) == 2
    assert "unknown goal metric of diabetes 'r3': did you mean 'r2'?" in capsys.readouterr().err
    # As the other tests expect to find it.
    assert run([*SMALL, "--out", str(compared)]) == 0
    for plot in compared.glob("plots/*-r2.*"):
        plot.unlink()


def test_several_batch_sizes_are_shown_across(tmp_path: Path, capsys: Capsys) -> None:
    small = ["compare", "diabetes", "-o", "sgd,adam", "--seeds", "1", "--epochs", "2", "--tune", "0"]
    assert run([*small, "--batch-sizes", "16,all", "--goal", "9", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "Epochs / seconds to a validation loss of 9.00" in shown
    assert "Batch sizes <span" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert run([*small, "--batch-sizes", "16,all", "--out", str(tmp_path), "--json"]) == 0
    (sweep,) = json.loads(capsys.readouterr().out)["sweeps"]
    assert (sweep["sizes"][0], sweep["sizes"][1]) == (16, sweep["whole"])


def test_tuning_chooses_on_other_seeds_and_says_so(tmp_path: Path, capsys: Capsys) -> None:
    small = ["compare", "diabetes", "-o", "sgd", "--seeds", "1", "--epochs", "1", "--tune", "2"]
    assert run([*small, "--out", str(tmp_path)]) == 0
    assert "tuned diabetes sgd, batch 32: lr" in capsys.readouterr().out
    assert {record.seed for record in RecordStore(tmp_path / "tuning").read_all()} == {1000, 1001, 1002}
    assert {record.seed for record in RecordStore(tmp_path / "records").read_all()} == {0}


def test_a_run_in_two_folders_counts_once(compared: Path, tmp_path: Path, capsys: Capsys) -> None:
    copy = shutil.copytree(compared / "records", tmp_path / "copy")
    assert run(["report", str(compared), str(copy), "--out", str(tmp_path / "r.html"), "--json"]) == 0
    shown = capsys.readouterr()
    assert shown.err == "4 records of runs that are there more than once left out: each counts once\n"
    (task,) = json.loads(shown.out)["tasks"]
    assert [row["attempted"] for row in task["rows"]] == [2, 2]


def test_how_options_were_chosen_is_told_of_those_whose_they_are(tmp_path: Path, capsys: Capsys) -> None:
    small = ["compare", "diabetes", "-o", "sgd,adam", "--seeds", "1", "--epochs", "1", "--set", "sgd.momentum=0.5"]
    assert run([*small, "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("SGD: learning rates as stored") and line.endswith("momentum") for line in lines)
    assert any(line.startswith("Adam: learning rates as stored") and "set by the user" not in line for line in lines)


def test_selections_are_arms_beside_all_of_the_data(tmp_path: Path, capsys: Capsys) -> None:
    arms = ["--select", "none", "--select", "sage:0.2", "--select", "random:0.20:every=1"]
    small = ["compare", "digits", "-o", "adamw", "--seeds", "1", "--epochs", "2", "--tune", "1", "--out", str(tmp_path)]
    assert run([*small, *arms]) == 0
    shown = capsys.readouterr()
    for words in ("AdamW, sage 0.2", "AdamW, random 0.2 (every=1)", "of them selecting", "what selecting takes"):
        assert words in shown.out
    records = {record.select: record for record in RecordStore(tmp_path / "records").read_all()}
    assert set(records) == {None, "sage:0.2", "random:0.2:every=1"}
    assert {record.steps for record in records.values()} == {32}
    assert len({record.fingerprint for record in records.values()}) == 1
    assert len({record.options["lr"] for record in records.values()}) == 1
    assert "\nlearning rate: best of 1 rate x 3 other seeds by validation loss on all of the data, in this" in shown.out
    assert run(["report", str(tmp_path), "--json"]) == 0
    (task,) = json.loads(capsys.readouterr().out)["tasks"]  # in the order of the comparison
    assert [row["select"] for row in task["rows"]] == [None, "sage:0.2", "random:0.2:every=1"]
    trials = RecordStore(tmp_path / "tuning").read_all()
    assert [(record.select, record.seed) for record in trials] == [(None, seed) for seed in (1000, 1001, 1002)]
    assert run([*small, "--select", "sage:0.2", "--json"]) == 0  # by itself, from the records
    (task,) = json.loads(capsys.readouterr().out)["tasks"]
    assert [(row["label"], row["select"]) for row in task["rows"]] == [("AdamW, sage 0.2", "sage:0.2")]


def test_selections_come_from_a_file_too(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('tasks = ["digits"]\noptimizers = ["sgd"]\nselect = ["random:0.3", "none"]\n')
    out = tmp_path / "out"
    assert (
        run(["compare", "--config", str(tmp_path / "c.toml"), "--seeds", "1", "--epochs", "2", "--out", str(out)]) == 0
    )
    assert {record.select for record in RecordStore(out / "records").read_all()} == {None, "random:0.3"}


def test_a_diverged_run_is_a_result_and_a_failed_one_is_an_error(tmp_path: Path, capsys: Capsys) -> None:
    small = ["compare", "digits", "--seeds", "1", "--epochs", "1"]
    assert run([*small, "-o", "sgd", "--set", "sgd.lr=1e12", "--out", str(tmp_path / "a")]) == 0
    assert "0/1 (1 diverged)" in capsys.readouterr().out
    assert run([*small, "-o", "sven", "--set", "sven.samples_per_row=7", "--out", str(tmp_path / "b")]) == 1
    shown = capsys.readouterr()
    assert "0/1 (1 failed)" in shown.out
    assert "no multiple of samples_per_row=7" in shown.err


BAD = {
    "no such command": (["train-all"], "No such command 'train-all'"),
    "no such flag": (["compare", "digits", "--epoch", "3"], "No such option"),
    "no task": (["compare"], "no task was named"),
    "no such task": (["compare", "digit"], "did you mean 'digits'"),
    "no such optimizer": (["compare", "digits", "-o", "adm"], "did you mean 'adam'"),
    "empty optimizers": (["compare", "digits", "-o", ","], "no optimizer was named"),
    "same optimizer twice": (["compare", "digits", "-o", "sgd,sgd"], "named twice"),
    "epochs is text": (["compare", "digits", "--epochs", "many"], "Invalid value for '--epochs'"),
    "no epochs": (["compare", "digits", "--epochs", "0"], "must be a finite number above 0"),
    "no seeds": (["compare", "digits", "--seeds", "0"], "no seed was given"),
    "negative budget": (["compare", "digits", "--budget-seconds", "-1"], "budget of seconds is -1"),
    "endless budget": (["compare", "digits", "--budget-seconds", "inf"], "budget of seconds is inf"),
    "impossible goal": (["compare", "digits", "--goal", "-1"], "the goal is -1"),
    "goal is text": (["compare", "digits", "--goal", "low"], "--goal 'low': write a number"),
    "goal of another task": (["compare", "digits", "--goal", "toy_1d=1"], "unknown task of a goal 'toy_1d'"),
    "no such goal metric": (
        ["compare", "digits", "--goal-metric", "acuracy"],
        "unknown goal metric of digits 'acuracy': did you mean 'accuracy'? Known: val_loss, accuracy",
    ),
    "goal metric of one task alone": (
        ["compare", "digits", "diabetes", "--goal-metric", "accuracy"],
        "unknown goal metric of diabetes 'accuracy': Known: val_loss, r2",
    ),
    "impossible goal of a metric": (
        ["compare", "digits", "--goal-metric", "accuracy", "--goal", "nan"],
        "the goal is nan: it must be a finite value of accuracy",
    ),
    "negative timeout": (["compare", "digits", "--timeout", "-3"], "timeout is -3"),
    "no such schedule": (
        ["compare", "digits", "--schedule", "linaer"],
        "'schedule' is 'linaer': it takes 'constant' or",
    ),
    "setting without value": (["compare", "digits", "--set", "sgd.lr"], "write OPTIMIZER.OPTION=VALUE"),
    "setting without optimizer": (["compare", "digits", "--set", "lr=1"], "write OPTIMIZER.OPTION=VALUE"),
    "setting of an unknown option": (["compare", "digits", "--set", "sgd.momentun=1"], "did you mean 'momentum'"),
    "setting of the wrong type": (["compare", "digits", "--set", "sgd.lr=fast"], "sgd.lr got 'fast': it takes float"),
    "impossible setting": (["compare", "digits", "--set", "sgd.lr=-1"], "Invalid learning rate"),
    "setting of a stranger": (["compare", "digits", "-o", "sgd", "--set", "adam.lr=1"], "not compared"),
    "lr set and tuned": (["compare", "digits", "--tune", "2", "--set", "sgd.lr=1"], "drop one of them"),
    "no such selection": (["compare", "digits", "--select", "sag:0.1"], "unknown selection method 'sag': did you mean"),
    "selection without fraction": (["compare", "digits", "--select", "sage"], "write METHOD:FRACTION"),
    "same selection twice": (["compare", "digits", "--select", "sage:0.1", "--select", "sage:.1"], "named twice"),
    "subset below a batch": (["compare", "digits", "--select", "sage:0.01"], "fewer than the batch size 64"),
    "no epoch after the warm-up": (
        ["compare", "digits", "--epochs", "2", "--select", "sage:0.1:warmup=2"],
        "comes after 2 epochs of all data, and a run on digits has 2",
    ),
    "train: no such selection option": (
        ["train", "digits", "--select", "sage:0.1:sketch=3"],
        "unknown option of sage 'sketch': did you mean 'sketch_size'",
    ),
    "train: two fractions": (["train", "digits", "--select", "sage:0.1:0.2"], "'0.2' is no option"),
    "negative trials": (["compare", "digits", "--tune", "-1"], "at least 1"),
    "batch too large": (["compare", "digits", "--batch-size", "99999"], "use a smaller one"),
    "no such device": (["compare", "digits", "--device", "gpu"], "device 'gpu'"),
    "no such model": (["compare", "digits", "--model", "mpl:3"], "did you mean 'mlp'"),
    "no such file of settings": (
        ["compare", "--config", "none.toml"],
        "none.toml cannot be read as TOML: No such file",
    ),
    "target without a table": (["compare", "digits", "--target", "y"], "--target is for a table of your own"),
    "no data folder": (["compare", "mnist", "--data", "nowhere"], "nowhere"),
    "no such table": (["compare", "none.csv", "--target", "y"], "none.csv"),
    "no such module": (["compare", "none_such:task"], "there is no module 'none_such' here"),
    "report of nothing": (["report", "nowhere"], "nowhere does not exist"),
    "train: no task": (["train"], "no task was named"),
    "train: two optimizers": (["train", "digits", "-o", "sgd,adam"], "unknown optimizer 'sgd,adam'"),
    "train: no such option": (["train", "digits", "-o", "sgd", "--set", "momentun=1"], "did you mean 'momentum'"),
    "train: another's option": (["train", "digits", "-o", "sgd", "--set", "adam.lr=1"], "is sgd, not adam"),
    "train: resume and fresh": (["train", "digits", "--resume", "--fresh"], "drop one of them"),
    "train: nothing to resume": (["train", "--resume", "--out", "nowhere"], "no checkpoint in nowhere"),
    "train: impossible period": (["train", "digits", "--checkpoint-every", "-1"], "seconds between checkpoints are -1"),
    "markup": (["compare", "[red]digits[/nothing]"], "unknown task '[red]digits[/nothing]'"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("steepest: ")
    assert shown.err.count("\n") == 1
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert not list(tmp_path.iterdir())


def test_an_output_folder_that_is_a_file_is_one_line(tmp_path: Path, capsys: Capsys) -> None:
    (tmp_path / "taken").write_text("mine")
    assert run([*SMALL, "--out", str(tmp_path / "taken")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "taken" in error
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_corrupt_record_is_one_line_and_the_others_stay(compared: Path, capsys: Capsys) -> None:
    victim = sorted((compared / "records").glob("*.jsonl"))[0]
    content = victim.read_text()
    try:
        victim.write_text(content[:100])
        assert run([*SMALL, "--out", str(compared)]) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        assert victim.name in error.splitlines()[-1]
        assert len(list((compared / "records").glob("*.jsonl"))) == 4
    finally:
        victim.write_text(content)


def test_debug_shows_the_traceback(capsys: Capsys) -> None:
    assert run(["compare", "digit", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_env_version_and_list(capsys: Capsys) -> None:
    assert run(["env", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert {"steepest", "torch", "python", "platform", "cpu", "threads", "dtype", "commit"} <= row.keys()
    assert run(["env"]) == 0
    assert "torch" in capsys.readouterr().out
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"steepest {__version__}\n"
    assert run(["list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("toy_1d", "sven", "momentum", "TruncatedEigh(...)"))
    methods = listed[listed.index("selection methods") :]
    assert all(word in methods for word in ("sage", "gradmatch", "sketch_size", "Strata(...)", "warmup", "every"))


def test_help_needs_no_torch() -> None:
    script = (
        "import sys\nfrom steepest.cli import run\ncode = run(['--help'])\n"
        "heavy = {'torch', 'numpy', 'sklearn', 'matplotlib', 'scipy'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "compare" in done.stdout


def _start(arguments: list[str], out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*STEEPEST, *arguments, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _wait_for_records(out: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(list(out.glob("records/*.jsonl"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


INTERRUPTED = ["compare", "diabetes", "-o", "sgd,adam", "--seeds", "3", "--epochs", "150"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an interrupted comparison must end with."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert run([*INTERRUPTED, "--out", str(out)]) == 0
    return out


@pytest.mark.skipif(os.name == "nt", reason="process groups and signals of POSIX")
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_comparison_goes_on_and_ends_bit_identical(
    stop: signal.Signals, tmp_path: Path, uninterrupted: Path
) -> None:
    process = _start(INTERRUPTED, tmp_path / "cut")
    try:
        _wait_for_records(tmp_path / "cut", 2)
        # Ctrl-C reaches the whole group of processes; kill -9 only the one that it names.
        (os.killpg if stop == signal.SIGINT else os.kill)(process.pid, stop)
        output, error = process.communicate(timeout=60)
    finally:
        process.kill()
    finished = results(tmp_path / "cut")
    assert 2 <= len(finished) < 6
    if stop == signal.SIGINT:
        assert process.returncode == 130, error
        assert "Traceback" not in error
        assert "interrupted; the finished runs are in" in error
        assert output == ""
    assert run([*INTERRUPTED, "--out", str(tmp_path / "cut")]) == 0
    resumed = results(tmp_path / "cut")
    assert resumed == results(uninterrupted)
    assert finished.items() <= resumed.items()
    assert not list((tmp_path / "cut").rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="kill -9 of POSIX")
def test_twenty_kills_at_random_moments_of_a_comparison(tmp_path: Path, uninterrupted: Path) -> None:
    moments, out, kills, stopped = random.Random(0), tmp_path / "cut", 20, 0
    for kill in range(kills):
        fresh = ["--fresh"] if kill % 4 == 0 else []  # else all are recorded after a few
        process = _start([*INTERRUPTED, *fresh], out)
        # From the first import to the end of the comparison.
        time.sleep(moments.uniform(0.5, 7.0))
        stopped += process.poll() is None
        process.kill()
        process.communicate(timeout=60)
        assert results(out).items() <= results(uninterrupted).items()
    assert stopped >= kills // 2
    assert run([*INTERRUPTED, "--out", str(out)]) == 0
    assert results(out) == results(uninterrupted)
    assert not list(out.rglob("*.tmp"))
