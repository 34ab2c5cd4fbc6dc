"""`steepest select`: the subset and its files, the check, bad input, interrupting and going on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import steepest as st
from steepest.cli import run
from steepest.commands import select as command
from steepest.commands.select import select_settings
from steepest.commands.select_progress import SelectionDisplay
from steepest.commands.select_settings import SelectSettings
from steepest.distributed.checkpoint.folders import complete_folders
from steepest.errors import InvalidOptionError
from steepest.selection.method import Method
from steepest.selection.report import Progress
from steepest.training.execute import execute
from steepest.training.select_text import parse_selection
from steepest.training.source import Source, resolve
from steepest.training.subsets import Subset

STEEPEST = [sys.executable, "-m", "steepest.cli"]
QUICK = ["select", "digits", "--fraction", "0.1", "--warmup", "1"]

Capsys = pytest.CaptureFixture[str]


def out_of(folder: Path) -> list[str]:
    return ["-o", str(folder / "subset.npz")]


def arrays(folder: Path) -> dict[str, Any]:
    with np.load(folder / "subset.npz", allow_pickle=False) as file:
        return {name: file[name] for name in ("indices", "scores", "weights", "labels")}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in a)


def selected_in(folder: Path) -> st.Selection:
    train = resolve(Source("digits")).load(0).train
    return st.Selection.load(folder / "subset.npz", data=(train.inputs, train.targets))


def test_a_selection_leaves_subset_report_page_and_scorer(tmp_path: Path, capsys: Capsys) -> None:
    assert run([*QUICK, *out_of(tmp_path)]) == 0
    shown = capsys.readouterr()
    names = {"subset.npz", "subset.json", "subset.html", "subset.scorer.pt"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert "sage kept 108 of 1,079 training samples, 10 %" in shown.out
    assert "it has paid after" in shown.out
    assert "epoch   1/1" in shown.err
    assert "2 passes over 1,079 samples: about" in shown.err
    assert shown.err.index("2 passes over") < shown.err.index("pass 2 of 2")
    selection = selected_in(tmp_path)
    assert (len(selection), selection.method) == (108, "sage")
    assert {kept for kept, _ in (selection.report.class_counts or {}).values()} == {10, 11}


def test_the_scorer_is_the_model_that_the_seed_and_the_warm_up_make(tmp_path: Path, capsys: Capsys) -> None:
    train = ["train", "digits", "-o", "adamw", "--epochs", "1", "--out", str(tmp_path / "run")]
    assert run(train) == 0
    assert run([*QUICK, *out_of(tmp_path)]) == 0
    brought = ["select", "digits", "--fraction", "0.1", "--weights", str(tmp_path / "run" / "model.pt")]
    (tmp_path / "b").mkdir()
    assert run([*brought, *out_of(tmp_path / "b")]) == 0
    assert same(arrays(tmp_path), arrays(tmp_path / "b"))
    assert "the model of model.pt" in capsys.readouterr().out


def test_json_is_all_there_is_on_standard_output(tmp_path: Path, capsys: Capsys) -> None:
    assert run([*QUICK, *out_of(tmp_path), "--json", "--method", "el2n", "--set", "keep=bottom"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["method"], data["kept"], data["options"]["keep"]) == ("el2n", 108, "bottom")
    assert data["seconds"]["scorer"] > 0
    assert all(Path(path).exists() for path in data["files"].values())


def test_the_break_even_counts_the_scorer(tmp_path: Path, capsys: Capsys) -> None:
    assert run([*QUICK, *out_of(tmp_path), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    seconds = data["seconds"]
    left_out = 1 - data["kept"] / data["num_samples"]
    expected = (seconds["selection"] + seconds["scorer"]) / (left_out * seconds["epoch"])
    assert data["paid_after_epochs"] == pytest.approx(expected)


def test_a_method_without_a_model_trains_no_scorer(tmp_path: Path, capsys: Capsys) -> None:
    assert run(["select", "digits", "--count", "50", "--method", "random", *out_of(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert "epoch" not in shown.err
    assert "no model: this method looks at none" in shown.out
    assert not (tmp_path / "subset.scorer.pt").exists()
    assert len(selected_in(tmp_path)) == 50


def test_what_is_to_be_noted_is_a_note_and_no_warning_of_python(tmp_path: Path) -> None:
    short = ["select", "digits", "--count", "5", "--method", "random", *out_of(tmp_path)]
    done = subprocess.run([*STEEPEST, *short], capture_output=True, text=True, check=True)
    assert "note: no sample of 5 of 10 classes was kept" in done.stdout
    assert "Warning" not in done.stderr


@pytest.mark.parametrize("name", ["subset", "subset.npz", "subset.json", "subset.v1.npz", "subset.v1"])
def test_the_files_are_where_the_command_says(name: str, tmp_path: Path, capsys: Capsys) -> None:
    command_ = ["select", "digits", "--count", "50", "--method", "random", "-o", str(tmp_path / name), "--json"]
    assert run(command_) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert {str(path) for path in tmp_path.iterdir()} == set(files.values())


def test_a_regression_is_chosen_from_as_well(tmp_path: Path, capsys: Capsys) -> None:
    assert run(["select", "diabetes", "--fraction", "0.2", "--warmup", "1", "--check", "1", *out_of(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "val R2" in shown
    assert "With one seed nothing is known of the spread" in shown


def test_a_file_of_settings_serves_and_flags_override_it(tmp_path: Path, capsys: Capsys) -> None:
    config = tmp_path / "select.toml"
    config.write_text(
        'task = "digits"\nfraction = 0.5\nwarmup = 1\n[options]\nsketch_size = 8\nrule = {type = "Top"}\n'
    )
    assert run(["select", "--config", str(config), "--fraction", "0.1", "--json", *out_of(tmp_path)]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["kept"], data["options"]["sketch_size"]) == (108, 8)
    assert data["options"]["rule"] == {"type": "Top"}


def made_by_select(name: str, *options: str) -> Method:
    return select_settings(None, {"method": name}, options).make_method()


@pytest.mark.parametrize("name", ["sage", "random", "EL2N", "grand", "herding", "kcenter", "k-center", "grad_match"])
def test_a_method_has_one_set_of_names_and_defaults_in_both_commands(name: str) -> None:
    plan = parse_selection(f"{name}:0.1")
    assert plan is not None
    assert made_by_select(name) == plan.entry.constructor()()


@pytest.mark.parametrize(
    ("options", "method"),
    [
        (["sage.sketch_size=8", "rule=top", "weights=class"], st.SAGE(sketch_size=8, rule=st.Top(), weights="class")),
        (["rule=random", "tail_cut=0.5", "seed=3"], st.SAGE(rule=st.RandomAboveCut(tail_cut=0.5, seed=3))),
        (["rule=Strata(tail_cut=0.3)", "scope=('0',)"], st.SAGE(rule=st.Strata(tail_cut=0.3), scope=("0",))),
        (["tail_cut=0.3"], st.SAGE(rule=st.Strata(tail_cut=0.3))),
    ],
)
def test_options_are_written_alike_in_both_commands(options: list[str], method: Method) -> None:
    plan = parse_selection(":".join(["sage:0.1", *options]))
    assert plan is not None
    assert made_by_select("sage", *options) == method
    assert plan.entry.make(plan.options, "here") == method


@pytest.mark.parametrize(
    "option", ["rull=top", "rule=top:tail_cut=0.1", "rule", "tail_cut=much", "sketch_size=0", "random.seed=1"]
)
def test_wrong_options_are_told_alike_in_both_commands(option: str) -> None:
    told = []
    with pytest.raises(InvalidOptionError) as caught:
        parse_selection(f"sage:0.1:{option}")
    told.append(str(caught.value).removeprefix(f"selection 'sage:0.1:{option}': "))
    with pytest.raises(InvalidOptionError) as caught:
        made_by_select("sage", *option.split(":"))
    told.append(str(caught.value).removeprefix("--set: ").removeprefix("sage: "))
    # When to select is a run's own matter, so that the lists of what is known differ.
    assert told[0].partition("Known:")[0] == told[1].partition("Known:")[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one, as in --fraction 0.1"),
        (["--fraction", "0.1", "--count", "5"], "both of them given"),
        (["--fraction", "1.5"], "at most 1"),
        (["--fraction", "nan"], "at most 1"),
        (["--count", "0"], "give 1 or more"),
        (["--count", "5000"], "has 1,079 training samples"),
        (["--fraction", "0.1", "--method", "sago"], "did you mean 'sage'?"),
        (["--fraction", "0.1", "--set", "sketch=3"], "did you mean 'sketch_size'?"),
        (["--fraction", "0.1", "--set", "sketch_size=0"], "at least 1"),
        (["--fraction", "0.1", "--set", "sketch_size=x"], "it takes int"),
        (["--fraction", "0.1", "--set", "rule=Strata(tail_cut=2)"], "tail_cut"),
        (["--fraction", "0.1", "--set", "random.seed=1"], "is sage, not random"),
        (["--fraction", "0.1", "--set", "rule"], "write NAME=VALUE"),
        (["--fraction", "0.1", "--warmup", "-1"], "0 or more"),
        (["--fraction", "0.1", "--check", "-1"], "1 or more"),
        (["--fraction", "0.1", "--weights", "no.pt"], "there is no model no.pt"),
        (["--fraction", "0.1", "--weights", "no.pt", "--warmup", "1"], "drop one of them"),
        (["--fraction", "0.1", "--optimizer", "adamww"], "did you mean 'adamw'?"),
        (["--fraction", "0.1", "--checkpoint-every", "-1"], "finite number"),
        (["--fraction", "0.1", "--config", "no.toml"], "no.toml"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["select", "digits", *arguments]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert not shown.out


def test_an_unknown_task_is_told_with_the_nearest(capsys: Capsys) -> None:
    assert run(["select", "digit", "--fraction", "0.1"]) == 2
    assert "did you mean 'digits'?" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_told_before_any_training(tmp_path: Path, capsys: Capsys) -> None:
    (tmp_path / "file").write_text("")
    assert run([*QUICK, "-o", str(tmp_path / "file" / "subset.npz")]) == 2
    shown = capsys.readouterr().err
    assert "cannot be written (Not a directory)" in shown
    assert "epoch" not in shown
    assert run([*QUICK, "-o", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err


def test_weights_of_another_model_are_refused(tmp_path: Path, capsys: Capsys) -> None:
    assert run(["train", "diabetes", "-o", "adamw", "--epochs", "1", "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    weights = tmp_path / "run" / "model.pt"
    assert run(["select", "digits", "--fraction", "0.1", "--weights", str(weights), *out_of(tmp_path)]) == 2
    assert "has the weights of another model than that of digits" in capsys.readouterr().err
    weights.write_bytes(weights.read_bytes()[:1000])
    assert run(["select", "diabetes", "--fraction", "0.1", "--weights", str(weights), *out_of(tmp_path)]) == 2
    assert "cannot be read as a model" in capsys.readouterr().err
    torch.save({"something": 1}, weights)
    assert run(["select", "diabetes", "--fraction", "0.1", "--weights", str(weights), *out_of(tmp_path)]) == 2
    assert "holds no state_dict" in capsys.readouterr().err


def test_a_selection_that_is_there_is_not_overwritten_unasked(tmp_path: Path, capsys: Capsys) -> None:
    assert run([*QUICK, *out_of(tmp_path)]) == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for more in ([], ["--seed", "1"], ["--seed", "1", "--check", "1"], ["--method", "el2n", "--check", "1"]):
        capsys.readouterr()
        assert run([*QUICK, *more, *out_of(tmp_path)]) == 2
        assert "--fresh" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    scorer = ["select", "digits", "--fraction", "0.2", "--weights", str(tmp_path / "subset.scorer.pt")]
    assert run([*scorer, "--fresh", *out_of(tmp_path)]) == 0  # the scorer of before is not thrown away with the rest
    assert run([*QUICK, "--seed", "1", "--fresh", *out_of(tmp_path)]) == 0
    assert (tmp_path / "subset.npz").read_bytes() != before[tmp_path / "subset.npz"]


def test_a_check_tells_who_won_and_may_be_added_later(tmp_path: Path, capsys: Capsys) -> None:
    assert run([*QUICK, *out_of(tmp_path)]) == 0
    before = (tmp_path / "subset.npz").read_bytes()
    capsys.readouterr()
    check = [*QUICK, "--check", "2", "--epochs", "2", *out_of(tmp_path), "--json"]
    assert run(check) == 0
    data = json.loads(capsys.readouterr().out)["check"]
    assert (tmp_path / "subset.npz").read_bytes() == before
    assert {(run["arm"], run["seed"]) for run in data["runs"]} == {
        (arm, seed) for arm in ("subset", "random", "everything") for seed in (0, 1)
    }
    assert data["steps"] == 2 * (1079 // 64)
    assert any("random subsets of the same size with the classes alike" in sentence for sentence in data["verdict"])
    assert "Did it pay?" in (tmp_path / "subset.html").read_text(encoding="utf-8")
    # Runs that are done are not repeated: their seconds are the same.
    assert run(check) == 0
    assert json.loads(capsys.readouterr().out)["check"]["runs"] == data["runs"]


def test_the_check_trains_as_a_run_with_a_selection_does(tmp_path: Path, capsys: Capsys) -> None:
    check = ["select", "digits", "--fraction", "0.1", "--method", "random", "--check", "1", "--epochs", "1"]
    assert run([*check, *out_of(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["check"]["runs"]
    spec = SelectSettings(task="digits", epochs=1).plan()
    indices = selected_in(tmp_path).indices
    expected = {
        "subset": execute(spec, subset=Subset(indices, torch.ones(len(indices)))),
        "everything": execute(spec),
    }
    for arm, record in expected.items():
        (of_arm,) = [run for run in found if run["arm"] == arm]
        assert record.final is not None
        assert of_arm["val_loss"] == record.final.val_loss


def test_what_no_scorer_can_mend_is_told_before_it_is_trained(tmp_path: Path, capsys: Capsys) -> None:
    for arguments, message in (
        (["digits", "--fraction", "0.1", "--set", "scope=('no_such',)"], "has no module 'no_such'"),
        (["diabetes", "--fraction", "0.3", "--set", "class_policy=balanced"], "no whole-number labels"),
        (["diabetes", "--fraction", "0.3", "--method", "kcenter", "--set", "class_policy=balanced"], "no whole-number"),
        (["digits", "--fraction", "0.2", "--method", "kcenter", "--set", "max_memory=100000"], "for 1079 samples"),
        (["digits", "--fraction", "0.001", "--check", "1"], "fewer than a batch of the check has (64)"),
    ):
        assert run(["select", *arguments, *out_of(tmp_path)]) == 2, arguments
        shown = capsys.readouterr().err
        assert message in shown
        assert shown.count("\n") == 1, shown  # no line of a training


def interrupted_at(place: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    told = SelectionDisplay.told

    def stop(self: SelectionDisplay, progress: Progress) -> None:
        told(self, progress)
        if progress.kind == "batch" and (progress.pass_number, progress.batch) == place:
            raise KeyboardInterrupt

    monkeypatch.setattr(SelectionDisplay, "told", stop)


def test_a_choice_of_one_after_another_is_shown(tmp_path: Path, capsys: Capsys) -> None:
    assert run([*QUICK, "--method", "kcenter", *out_of(tmp_path)]) == 0
    assert "\nchoosing (" in capsys.readouterr().err


@pytest.mark.parametrize("place", [(0, 2), (1, 3)])
def test_an_interrupted_selection_goes_on_and_ends_the_same(
    place: tuple[int, int], tmp_path: Path, capsys: Capsys
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    assert run([*QUICK, *out_of(whole)]) == 0
    with pytest.MonkeyPatch.context() as patch:
        interrupted_at(place, patch)
        assert run([*QUICK, *out_of(parts)]) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    assert (parts / "subset.checkpoint").exists()
    assert not (parts / "subset.npz").exists()
    assert run([*QUICK, *out_of(parts)]) == 0
    shown = capsys.readouterr().err
    assert "epoch" not in shown  # the scorer was kept
    assert f"pass {1 + place[0]} of 2" in shown
    assert same(arrays(whole), arrays(parts))
    assert not (parts / "subset.checkpoint").exists()


def test_a_checkpoint_of_another_scorer_or_a_damaged_one_is_refused(tmp_path: Path, capsys: Capsys) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupted_at((0, 2), patch)
        assert run([*QUICK, *out_of(tmp_path)]) == 130
    capsys.readouterr()
    assert run([*QUICK, "--seed", "1", *out_of(tmp_path)]) == 2
    assert "whose scorer is not the one that these settings make" in capsys.readouterr().err
    assert run([*QUICK, "--set", "sketch_size=8", *out_of(tmp_path)]) == 2
    assert "of another selection" in capsys.readouterr().err
    checkpoint = tmp_path / "subset.checkpoint"
    (data,) = checkpoint.glob("step-*/*.distcp")
    data.write_bytes(data.read_bytes()[:500])
    assert run([*QUICK, *out_of(tmp_path)]) == 2
    assert "is damaged: it has 500 bytes" in capsys.readouterr().err
    assert run([*QUICK, "--fresh", *out_of(tmp_path)]) == 0
    assert not checkpoint.exists()


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_used(tmp_path: Path, capsys: Capsys) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupted_at((1, 3), patch)
        assert run([*QUICK, "--checkpoint-every", "0", *out_of(tmp_path)]) == 130
    older, newer = complete_folders(tmp_path / "subset.checkpoint")
    (newer / "manifest.json").write_text("{}")
    capsys.readouterr()
    assert run([*QUICK, *out_of(tmp_path)]) == 0
    shown = capsys.readouterr().err
    assert f"{newer}/manifest.json is damaged" in shown
    assert f"going on from the one before, {older}" in shown
    assert shown.count("going on from") == 1
    assert "pass 1 of 2" not in shown


def test_a_checkpoint_that_an_earlier_version_wrote_is_refused_and_thrown_away_on_request(
    tmp_path: Path, capsys: Capsys
) -> None:
    for name in ("subset.checkpoint", "subset.checkpoint.0-of-2"):
        (tmp_path / name).write_bytes(b"")
        assert run([*QUICK, "--method", "random", *out_of(tmp_path)]) == 2
        assert f"{name} is a file, as earlier versions kept a selection under way" in capsys.readouterr().err
        assert run([*QUICK, "--method", "random", "--fresh", *out_of(tmp_path)]) == 0
        assert not (tmp_path / name).exists()
        for path in tmp_path.glob("subset.*"):
            path.unlink()


def test_an_interrupted_check_goes_on_with_the_runs_that_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    check = [*QUICK, "--check", "1", "--epochs", "1", *out_of(tmp_path)]
    real = command.check_selection

    def stop(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "check_selection", stop)
    assert run(check) == 130
    assert (tmp_path / "subset.npz").exists()
    assert not (tmp_path / "subset.html").exists()
    monkeypatch.setattr(command, "check_selection", real)
    capsys.readouterr()
    assert run(check) == 0
    assert "going on with the selection" in capsys.readouterr().err
    (tmp_path / "subset.check.json").write_text("{")
    assert run(check) == 2
    assert "delete it to have its runs repeated" in capsys.readouterr().err


def test_ctrl_c_while_the_scorer_trains_ends_with_130_and_the_training_goes_on(tmp_path: Path) -> None:
    long = ["select", "digits", "--fraction", "0.1", "--warmup", "60", "--checkpoint-every", "0.02"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*STEEPEST, *long, *out_of(tmp_path)], stderr=subprocess.PIPE, text=True, env=environment
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("subset.scorer.checkpoints/step*")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "the same command goes on" in errors
    whole = tmp_path / "whole"
    for folder in (tmp_path, whole):
        assert run([*long, *out_of(folder)]) == 0
    assert same(arrays(tmp_path), arrays(whole))
