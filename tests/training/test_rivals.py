"""Other people's optimizers: that an entry is the package's own steps, learns, and goes on after an interruption."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import steepest as st
from steepest.errors import InvalidOptionError
from steepest.report.palette import contrast
from steepest.training import rivals
from steepest.training.checkpoint import Keeping
from steepest.training.compare import resolve_options
from steepest.training.execute import execute
from steepest.training.optimizers import muon, soap
from steepest.training.records import RunRecord
from steepest.training.registry import get_optimizer, optimizers
from steepest.training.rivals import MissingPackageError
from steepest.training.source import Source, resolve
from steepest.training.spec import RunSpec

PACKAGES = {"soap": "pytorch_optimizer", "levenberg-marquardt": "torch_levenberg_marquardt"}
RATES = {"muon": 0.02, "soap": 0.02, "half-inverse": 0.05, "lbfgs-full": 1.0, "levenberg-marquardt": 1.0}


def needs(name: str) -> Any:
    """A name, skipped where its package is not installed."""
    missing = name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None
    reason = f"{PACKAGES.get(name)} is not installed: `make peers`"
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=reason))


RIVALS = [needs(name) for name in RATES]


def run_of(name: str, task: str, epochs: int, **given: object) -> RunSpec:
    options = resolve_options(resolve(Source(task)), get_optimizer(name), {"lr": RATES[name], **given})
    return RunSpec(task, name, options, epochs=epochs, batch_size=32)


def model_of(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)]
    return nn.Sequential(*layers)


def trained(model: nn.Module, *opts: torch.optim.Optimizer, steps: int = 5) -> nn.Module:
    torch.manual_seed(7)
    x = torch.randn(20, 3)
    for _ in range(steps):
        model.zero_grad()
        torch.autograd.backward((model(x) - x[:, :2]).square().mean())
        for opt in opts:
            opt.step()
    return model


def assert_equal_models(one: nn.Module, other: nn.Module) -> None:
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("task", ["diabetes", "digits"])
@pytest.mark.parametrize("name", RIVALS)
def test_the_loss_falls_within_two_epochs(name: str, task: str) -> None:
    record = execute(run_of(name, task, 2))
    assert record.status == "finished", record.error
    losses = [point.val_loss for point in record.history]
    assert losses[0] is not None
    assert losses[-1] is not None
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
@pytest.mark.parametrize("name", RIVALS)
def test_a_continued_run_is_bit_identical(name: str, steps: int, tmp_path: Path) -> None:
    run = run_of(name, "diabetes", 3 if get_optimizer(name).full_batch is False else 7)
    whole = execute(run)
    assert whole.status == "finished", whole.error
    left = iter(range(steps))
    with pytest.raises(KeyboardInterrupt):
        execute(run, keeping=keeping(tmp_path, lambda: next(left, None) is None))
    assert numbers(execute(run, keeping=keeping(tmp_path, lambda: False))) == numbers(whole)


def keeping(folder: Path, stop: Callable[[], bool]) -> Keeping:
    return Keeping(folder / "checkpoints", folder / "model.pt", every=1e9, stop=stop)


def numbers(record: RunRecord) -> tuple[object, ...]:
    history = [(p.epoch, p.steps, p.train_loss, p.val_loss, p.diagnostics) for p in record.history]
    return record.status, record.error, record.final, record.steps, history


@pytest.mark.parametrize("name", RIVALS)
def test_every_rival_can_be_tuned_and_told_apart(name: str) -> None:
    entry = get_optimizer(name)
    assert entry.lr_range[0] < entry.lr_range[1]
    assert entry.label
    assert entry.description


def test_no_two_optimizers_have_the_same_colour() -> None:
    colours = [entry.colour for entry in optimizers().values()]
    assert len(set(colours)) == len(colours)
    for one, other in itertools.combinations([optimizers()[name].colour for name in RATES], 2):
        apart = math.dist(*([int(colour[at : at + 2], 16) for at in (1, 3, 5)] for colour in (one, other)))
        assert apart > 90, (one, other)
        assert contrast(one, other) >= 1


def test_muon_is_torchs_muon_on_inner_matrices_and_adamw_on_the_rest() -> None:
    mine, theirs = model_of(), model_of()
    inner = [theirs[2].weight, theirs[4].weight]
    rest = [param for param in theirs.parameters() if all(param is not weight for weight in inner)]
    opts = [
        torch.optim.Muon(inner, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.01, weight_decay=0.1),
    ]
    ours = muon.MuonWithAdamW(mine.parameters(), lr=0.02, adamw_lr=0.01, weight_decay=0.1)
    assert ours.num_matrices == 2
    assert_equal_models(trained(mine, ours), trained(theirs, *opts))


def test_muon_may_train_the_ends_too_and_keeps_frozen_parameters() -> None:
    model = model_of()
    model[0].weight.requires_grad_(False)
    opt = muon.MuonWithAdamW(model.parameters(), ends="muon")
    assert opt.num_matrices == 3
    assert [len(group["params"]) for group in opt.param_groups] == [3, 4]
    before = model[0].weight.clone()
    trained(model, opt)
    assert torch.equal(model[0].weight, before)


def test_muon_without_a_matrix_says_so_instead_of_being_adamw() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(InvalidOptionError, match=r"muon\.ends=muon"):
        trained(model, muon.MuonWithAdamW(model.parameters()))
    trained(model, muon.MuonWithAdamW(model.parameters(), ends="muon"))


def test_a_torch_without_muon_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(InvalidOptionError, match=r"muon: Muon comes from torch 2\.9 or later"):
        run_of("muon", "diabetes", 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"lr=-1\.0"),
        ({"momentum": 1.0}, r"momentum=1\.0"),
        ({"adamw_lr": -1.0}, r"adamw_lr=-1\.0"),
        ({"weight_decay": -1.0}, r"weight_decay=-1\.0"),
        ({"ns_steps": 0}, "ns_steps=0"),
        ({"ends": "sgd"}, "ends='sgd'"),
        ({"adjust_lr_fn": "none"}, "adjust_lr_fn='none'"),
    ],
)
def test_impossible_options_of_muon_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        muon.MuonWithAdamW(model_of().parameters(), **options)


def test_a_schedule_reaches_every_part_of_muon() -> None:
    mine, theirs = model_of(), model_of()
    opt = muon.MuonWithAdamW(mine.parameters(), lr=0.0)
    assert_equal_models(trained(mine, opt), theirs)
    for group in opt.param_groups:
        group["lr"] = 0.02
    assert_equal_models(trained(mine, opt), trained(theirs, warm_muon(theirs)))


def warm_muon(model: nn.Module) -> torch.optim.Optimizer:
    """Muon after the same five steps of length zero."""
    opt = muon.MuonWithAdamW(model.parameters(), lr=0.0)
    trained(model, opt)
    state = opt.state_dict()
    fresh = muon.MuonWithAdamW(model.parameters(), lr=0.02)
    for group in state["param_groups"]:
        group["lr"] = 0.02
    fresh.load_state_dict(state)
    return fresh


def test_soap_is_the_packages() -> None:
    package = pytest.importorskip("pytorch_optimizer", reason="pytorch-optimizer is not installed: `make peers`")
    mine, theirs = model_of(), model_of()
    options: dict[str, Any] = {"lr": 0.01, "precondition_frequency": 3, "weight_decay": 0.1}
    ours = soap.SOAP(mine.parameters(), **options)
    assert_equal_models(
        trained(mine, ours, steps=12), trained(theirs, package.SOAP(theirs.parameters(), **options), steps=12)
    )


@pytest.mark.parametrize("name", list(PACKAGES))
def test_a_missing_package_is_told_with_the_command_that_installs_it(name: str, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "class Nothing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {PACKAGES[name]!r}: raise ModuleNotFoundError(f'No module named {{name}}', name=name)\n"
        "sys.meta_path.insert(0, Nothing())\n"
        "from steepest.cli import main\n"
        f"sys.argv = ['steepest', 'compare', 'diabetes', '-o', {name!r}, '--out', {str(tmp_path)!r}]\n"
        "main()\n"
    )
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "300"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 2, done.stderr
    package = PACKAGES[name].replace("_", "-")
    message = " ".join(done.stderr.split())
    assert f"python -m pip install {package}" in message, done.stderr
    assert "Traceback" not in message


def test_a_package_that_cannot_be_imported_is_told() -> None:
    def broken(_name: str) -> Any:
        raise RuntimeError("operator does not exist")

    with pytest.raises(MissingPackageError, match="RuntimeError: operator does not exist"):
        rivals.load("soap", "soap", "SOAP", broken)


def test_the_half_inverse_is_that_of_the_dense_jacobian() -> None:
    record = run_of("half-inverse", "diabetes", 1)
    assert record.options["solver"] == st.TruncatedEigh(rtol=1e-6, exponent=0.5)
    assert (record.options["rows"], record.options["max_norm_ratio"]) == ("residuals", None)
    assert run_of("half-inverse", "digits", 1).options["kappa"] == 1.0
    model = model_of().double()
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def residuals() -> torch.Tensor:
        return model(x)[:, 0] - x[:, 0]

    rows = [torch.autograd.grad(row, list(model.parameters()), retain_graph=True) for row in residuals()]
    dense = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    left, values, right = torch.linalg.svd(dense, full_matrices=False)
    wanted = right.T @ (values**-0.5 * (left.T @ residuals().detach()))
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    options = {**record.options, "lr": 1.0}
    st.Sven(model, **options).step(residuals)  # type: ignore[arg-type]
    moved = before - nn.utils.parameters_to_vector(model.parameters()).detach()
    torch.testing.assert_close(moved, wanted, rtol=1e-7, atol=1e-10)
