"""Settings from TOML files and flags."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest

from steepest import cli
from steepest.errors import InvalidOptionError
from steepest.training.convert import convert
from steepest.training.errors import ConfigError
from steepest.training.settings import CompareSettings, Settings, TrainSettings, merge, read_settings

FILE = """
task = "digits"
epochs = 7
ignore = ["a", "b"]

[options]
lr = 1
solver = { type = "Damped", damping = 0.5 }
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    content = read_settings(write(tmp_path, FILE), TrainSettings)
    flags = {"epochs": 9, "seed": None, "options": {"lr": 0.5, "kappa": 1.0}}
    settings = merge(TrainSettings, content, flags)
    assert (settings.task, settings.epochs, settings.seed, settings.ignore) == ("digits", 9, 0, ("a", "b"))
    assert settings.options == {"lr": 0.5, "kappa": 1.0, "solver": {"type": "Damped", "damping": 0.5}}


def test_another_solver_replaces_the_whole_table(tmp_path: Path) -> None:
    content = read_settings(write(tmp_path, FILE), TrainSettings)
    other = {"options": {"solver": {"type": "TruncatedEigh", "rank": 3}}}
    assert merge(TrainSettings, content, other).options["solver"] == {"type": "TruncatedEigh", "rank": 3}


def test_options_of_a_comparison_are_merged_by_optimizer() -> None:
    layers = ({"options": {"sgd": {"lr": 1.0}, "adam": {"lr": 2.0}}}, {"options": {"sgd": {"momentum": 0.5}}})
    assert merge(CompareSettings, *layers).options == {"sgd": {"lr": 1.0, "momentum": 0.5}, "adam": {"lr": 2.0}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3", "unknown key 'epoch': did you mean 'epochs'"),
        ("optimizers = ['sgd']", "unknown key 'optimizers': did you mean 'optimizer'"),
        ("epochs = 'many'", "key 'epochs' is 'many': it takes int or none"),
        ("epochs = 1.5", "key 'epochs' is 1.5: it takes int or none"),
        ("epochs = true", "key 'epochs' is True"),
        ("schedule = 'cosine'", "it takes 'constant' or 'linear'"),
        ("kind = 'clasification'", "it takes 'classification' or 'regression'"),
        ("ignore = [1]", "key 'ignore' is [1]"),
        ("options = 3", "key 'options' is 3"),
        ("epochs = ", "cannot be read as TOML"),
        ("\x00", "cannot be read as TOML"),
    ],
)
def test_a_wrong_file_is_told(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_settings(write(tmp_path, text), TrainSettings)
    assert message in str(caught.value)
    assert "run.toml" in str(caught.value)


def test_a_missing_or_unreadable_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_settings(tmp_path / "none.toml", TrainSettings)
    with pytest.raises(ConfigError, match="Is a directory"):
        read_settings(tmp_path, TrainSettings)
    (tmp_path / "latin.toml").write_bytes(b"task = '\xe4'")
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        read_settings(tmp_path / "latin.toml", TrainSettings)


@pytest.mark.parametrize(("kind", "command"), [(TrainSettings, cli.train), (CompareSettings, cli.compare)])
def test_every_setting_has_a_flag_and_every_flag_is_a_setting(kind: type[Settings], command: object) -> None:
    flags = set(inspect.signature(command).parameters) - cli._STEERING  # type: ignore[arg-type]
    assert flags | {"options"} == {field.name for field in dataclasses.fields(kind)}


def test_settings_go_through_json_and_back() -> None:
    import json

    settings = TrainSettings(task="digits", ignore=("a",), options={"lr": 0.5, "betas": (0.9, 0.99)})
    again = merge(TrainSettings, json.loads(settings.to_json()))
    assert again.task == "digits"
    assert again.ignore == ("a",)
    assert convert(again.options["betas"], tuple[float, float]) == (True, (0.9, 0.99))


def test_a_table_is_a_task_of_its_own(tmp_path: Path) -> None:
    table = tmp_path / "data.csv"
    table.write_text("x,y\n1,2\n")
    (source,) = CompareSettings(data=str(table), target="y").sources(())
    assert (source.name, source.data, source.target) == (str(table), None, "y")
    with pytest.raises(InvalidOptionError, match="a task is named besides it"):
        CompareSettings(data=str(table)).sources(("digits",))
    with pytest.raises(InvalidOptionError, match="no task was named"):
        CompareSettings().sources(())
    (source,) = CompareSettings(data=str(tmp_path)).sources(("mnist",))
    assert (source.name, source.data) == ("mnist", str(tmp_path))
