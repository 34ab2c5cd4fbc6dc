"""Every example of an equation runs, draws its picture, and gets nearer to the solution."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
# Steps, and an error that an untrained network is far above.
RUNS = {
    "poisson": (12, 0.2),
    "helmholtz": (25, 0.9),
    "heat": (12, 0.2),
    "burgers": (12, 0.9),
    "inverse": (15, 0.2),
    "constrained_fit": (20, 0.3),
    "implicit_image": (20, 0.4),
}


@pytest.fixture(autouse=True)
def _default_dtype() -> Iterator[None]:
    """Examples set it, as a script may."""
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_example_of_an_equation_is_left_out() -> None:
    found = {
        path.stem for path in EXAMPLES.glob("*.py") if "def main(steps: int, path: str)" in path.read_text("utf-8")
    }
    assert found == RUNS.keys()


@pytest.mark.parametrize("name", RUNS)
def test_an_example_comes_nearer_to_the_solution_and_draws_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps, bound = RUNS[name]
    module, picture = load(name), tmp_path / "picture.png"
    error = module.main(steps, str(picture))
    assert error < bound
    assert module.main(0, str(tmp_path / "untrained.png")) > bound
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert f"relative L2 error {error:.1e}" in shown
    # The docstring says how it is run.
    assert re.search(rf"^python examples/{name}\.py --steps \d+ --out {name}\.png$", str(module.__doc__), re.MULTILINE)
