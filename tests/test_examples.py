"""The examples run, and what README and CONTRIBUTING tell one to type exists."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from steepest.cli import app, run
from steepest.training.records import RecordStore
from steepest.training.registry import optimizers, tasks

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
OWN = EXAMPLES / "own_task.py"
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md")}

Capsys = pytest.CaptureFixture[str]


def test_the_task_of_ones_own_is_compared(tmp_path: Path) -> None:
    quick = ["-o", "sven,adam", "--seeds", "1", "--tune", "0", "--set", "sven.lr=1", "--set", "adam.lr=0.05"]
    assert run(["compare", f"{OWN}:TASK", *quick, "--out", str(tmp_path)]) == 0
    records = RecordStore(tmp_path / "records").read_all()
    assert {(record.task, record.optimizer, record.status) for record in records} == {
        ("spirals", "sven", "finished"),
        ("spirals", "adam", "finished"),
    }
    for record in records:
        assert record.samples == (600, 200, 200)
        assert record.num_parameters == (2 * 32 + 32) + (32 * 32 + 32) + (32 * 2 + 2)
        assert record.problem.digest, "the user's code is part of the run"
        accuracy = record.final.test_metrics["accuracy"] if record.final else None
        # Half of the points by chance. One seed of Adam may stay at three quarters of them.
        assert accuracy is not None
        assert accuracy > (0.9 if record.optimizer == "sven" else 0.55)
    assert "spirals" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_model_of_ones_own_fits_another_task(tmp_path: Path) -> None:
    arguments = ["train", "diabetes", "-o", "sven", "--epochs", "1", "--model", f"{OWN}:Sines"]
    assert run([*arguments, "--out", str(tmp_path)]) == 0
    (record,) = RecordStore(tmp_path / "records").read_all()
    assert record.num_parameters == (10 * 32 + 32) + (32 * 32 + 32) + (32 + 1)


def test_the_file_of_settings_is_obeyed_and_flags_win(tmp_path: Path, capsys: Capsys) -> None:
    quick = ["--seeds", "1", "--epochs", "1", "--out", str(tmp_path)]
    assert run(["compare", "--config", str(EXAMPLES / "compare.toml"), *quick]) == 0
    records = {(record.task, record.optimizer): record for record in RecordStore(tmp_path / "records").read_all()}
    assert records.keys() == {(task, name) for task in ("digits", "diabetes") for name in ("sven", "sgd", "adam")}
    assert all((record.epochs, record.seed, record.status) == (1, 0, "finished") for record in records.values())
    for task in ("digits", "diabetes"):
        assert records[task, "sgd"].options["nesterov"] is True
        solver = records[task, "sven"].options["solver"]
        assert isinstance(solver, dict)
        assert (solver["type"], solver["damping"]) == ("Damped", 0.2)
    shown = capsys.readouterr().out
    assert shown.count("given by the user") == 2  # both goals


def commands(text: str) -> Iterator[list[str]]:
    """What stands after `steepest` in the code blocks of a text; a quoted argument may go over several lines."""
    for block in re.findall(r"^```(?:\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        pending = ""
        for line in block.splitlines():
            pending += line
            try:
                words = shlex.split(pending, comments=True)
            except ValueError:  # an open quotation
                pending += "\n"
                continue
            pending = ""
            if words and Path(words[0]).name == "steepest":
                yield words[1:]


COMMANDS = {
    " ".join(words): words for text in (*TEXTS.values(), OWN.read_text(encoding="utf-8")) for words in commands(text)
}
# The examples say how to run them in a docstring and a comment, without a code block.
COMMANDS |= {
    line: shlex.split(line)[1:]
    for file in EXAMPLES.iterdir()
    if file.suffix in {".py", ".toml"}
    for line in re.findall(r"^[# ]+(steepest (?:train|compare|report) .*)$", file.read_text("utf-8"), re.MULTILINE)
}


def parse(words: list[str]) -> dict[str, Any]:
    """Parameters of a command line, which is parsed and not run."""
    group: Any = typer.main.get_command(app)
    command = group.commands[words[0]]
    return dict(command.make_context(words[0], list(words[1:])).params)


def test_commands_are_found_in_the_texts() -> None:
    assert len(COMMANDS) >= 12
    assert {words[0] for words in COMMANDS.values()} == {"compare", "train", "report", "list", "select"}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS.keys())
def test_a_documented_command_parses_and_names_what_exists(words: list[str]) -> None:
    parameters = parse(words)
    named = [*(parameters.get("tasks") or []), *([parameters["task"]] if parameters.get("task") else [])]
    for name in named:
        file = name.partition(":")[0]
        assert name in tasks() or file.endswith(".csv") or (ROOT / file).is_file(), name
    chosen = parameters.get("optimizers") or parameters.get("optimizer") or ""
    assert set(filter(None, chosen.split(","))) <= optimizers().keys()
    for setting in parameters.get("set_") or []:
        owner, _, option = setting.partition("=")[0].rpartition(".")
        assert option in optimizers()[owner or parameters["optimizer"]].specs(), setting
    assert parameters.get("config") is None or (ROOT / parameters["config"]).is_file()


def test_a_flag_that_does_not_exist_is_noticed() -> None:
    with pytest.raises(Exception, match="--epoch"):
        parse(["compare", "digits", "--epoch", "3"])


def flags() -> set[str]:
    """Flags of all commands."""
    group: Any = typer.main.get_command(app)
    both = [group, *group.commands.values()]
    return {name for command in both for parameter in command.params for name in parameter.opts}


@pytest.mark.parametrize("name", TEXTS)
def test_flags_targets_tasks_and_files_in_the_running_text_exist(name: str) -> None:
    prose = re.sub(r"^```.*?^```", "", TEXTS[name], flags=re.MULTILINE | re.DOTALL)
    spans = [span for span in re.findall(r"`([^`]+)`", prose) if not span.startswith("mypy ")]
    assert {flag for span in spans for flag in re.findall(r"(?<!\S)--[a-z][a-z-]*", span)} <= flags()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {span.split()[1] for span in spans if re.match(r"make [a-z]", span)} <= targets
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXTS[name]) if "//" not in link]
    assert links
    assert all((ROOT / link).exists() for link in links)


def test_the_table_of_tasks_in_the_readme_names_tasks_that_exist() -> None:
    section = TEXTS["README.md"].partition("## Built-in tasks")[2].partition("\n## ")[0]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("| ") and "tasks" not in line]
    listed = [name.strip() for row in rows for name in row[2].split(",")]
    assert len(listed) == len(set(listed)) >= 15
    assert set(listed) <= tasks().keys()
