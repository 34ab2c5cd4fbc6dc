"""Where tasks come from: registry, files, tables, the user's own code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steepest.errors import InvalidOptionError, SteepestError
from steepest.training.errors import DataError, UnknownNameError
from steepest.training.source import Source, fingerprinted, resolve
from steepest.training.spec import RunSpec

CODE = """
import torch
from torch import nn
from steepest.training.data import Split, Splits
from steepest.training.losses import SquaredError
from steepest.training.metrics import R2
from steepest.training.models import hidden
from steepest.training.task import Task

def load(seed):
    x = torch.linspace(-1, 1, 60).unsqueeze(1)
    return Splits(*(Split(x, x.sin()) for _ in range(3)))

waves = Task("waves", "a sine", "regression", load, hidden(4), SquaredError(), (R2,), 16, 2)

def make_waves():
    return waves

number = 3

class Net(nn.Module):
    def __init__(self, in_features, out_features, width=5):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(in_features, width), nn.Tanh(), nn.Linear(width, out_features))
    def forward(self, x):
        return self.layers(x)

class Greedy(nn.Module):
    def __init__(self, depth, temperature):
        super().__init__()

def no_module(input_shape):
    return input_shape
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a user's code, to be in."""
    (tmp_path / "waves_code.py").write_text(CODE)
    (tmp_path / "broken_code.py").write_text("import steepest\n1 / 0\n")
    (tmp_path / "needy_code.py").write_text("import surely_not_installed\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["waves_code:waves", "waves_code:make_waves", "waves_code.py:waves"])
def test_a_task_of_the_users_own_is_found(here: Path, name: str) -> None:
    task = resolve(Source(name))
    assert task.name == "waves"
    assert len(task.load(0).train) == 60
    assert fingerprinted(Source(name), task).digest


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("waves_code:wave", UnknownNameError, "did you mean 'waves'"),
        ("waves_code:number", InvalidOptionError, "waves_code:number is int"),
        ("no_such_code:task", InvalidOptionError, "there is no module 'no_such_code' here"),
        ("broken_code:task", InvalidOptionError, "importing broken_code failed with ZeroDivisionError"),
        ("needy_code:task", InvalidOptionError, "needs the module surely_not_installed"),
        ("digit", UnknownNameError, "did you mean 'digits'"),
        ("missing.csv", DataError, "missing.csv"),
        ("missing.py:task", OSError, "missing.py"),
    ],
)
def test_what_is_not_there_is_told(here: Path, name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        resolve(Source(name, target="y" if name.endswith("csv") else None))
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["waves_code:Net", "waves_code.py:Net"])
def test_a_model_of_the_users_own_gets_what_it_asks_for(here: Path, name: str) -> None:
    task = resolve(Source("digits", model=name))
    model = task.model(task.load(0).shape)
    assert [p.shape for p in model.parameters()] == [(5, 64), (5,), (10, 5), (10,)]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("mpl:3", "unknown model 'mpl': did you mean 'mlp'"),
        ("mlp:3,x", "give whole numbers above 0"),
        ("mlp:0", "give whole numbers above 0"),
        ("cnn:8", "needs inputs [C, H, W]"),
        ("waves_code:Greedy", "needs depth, temperature"),
        ("waves_code:number", "is int: name a class or a function"),
        ("waves_code:no_module", "made tuple"),
    ],
)
def test_a_wrong_model_is_told(here: Path, model: str, message: str) -> None:
    with pytest.raises(InvalidOptionError) as caught:
        resolve(Source("digits", model=model)).model(resolve(Source("digits")).load(0).shape)
    assert message in str(caught.value)


def test_named_models_have_the_widths_that_are_given() -> None:
    task = resolve(Source("digits", model="mlp:7"))
    shapes = [tuple(p.shape) for p in task.model(task.load(0).shape).parameters()]
    assert shapes == [(7, 64), (7,), (10, 7), (10,)]


def test_settings_of_tables_are_refused_elsewhere() -> None:
    for setting in ({"target": "x"}, {"kind": "regression"}, {"ignore": ("x",)}, {"drop_missing": True}):
        with pytest.raises(InvalidOptionError, match="is for a table of your own"):
            resolve(replace(Source("digits"), **setting))  # type: ignore[arg-type]


def test_a_task_from_files_says_where_it_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("STEEPEST_DATA", raising=False)
    with pytest.raises(DataError, match="--data or STEEPEST_DATA"):
        resolve(Source("mnist"))
    with pytest.raises(DataError, match="does not exist"):
        resolve(Source("mnist", data=str(tmp_path / "nowhere")))
    with pytest.raises(SteepestError, match="mnist"):
        resolve(Source("mnist", data=str(tmp_path))).load(0)


def test_the_key_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    def key(folder: str, text: str) -> str:
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "data.csv"
        path.write_text(text)
        source = Source(str(path), target="y")
        return RunSpec("data", "sgd", source=fingerprinted(source, resolve(source))).key()

    rows = "".join(f"{i},{i * i / 7}\n" for i in range(60))
    assert key("a", "x,y\n" + rows) == key("b", "x,y\n" + rows)
    assert key("c", "x,y\n" + rows.replace("3,", "4,")) != key("d", "x,y\n" + rows)


def test_changed_code_is_another_run(here: Path) -> None:
    source = Source("digits", model="waves_code.py:Net")
    before = fingerprinted(source, resolve(source)).digest
    (here / "waves_code.py").write_text(CODE.replace("Tanh", "ReLU"))
    assert fingerprinted(source, resolve(source)).digest != before


def test_shapes_of_data() -> None:
    digits, toy = resolve(Source("digits")).load(0), resolve(Source("toy_1d")).load(0)
    assert (digits.shape.inputs, digits.shape.outputs) == ((64,), 10)
    assert (toy.shape.features, toy.shape.outputs) == (1, 1)
    assert torch.is_floating_point(toy.train.targets)
