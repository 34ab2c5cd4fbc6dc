"""Optimizers that take the whole training split in every step: full-batch L-BFGS and Levenberg-Marquardt."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from steepest.errors import ClosureError, InvalidOptionError
from steepest.training.compare import Request, plan_runs, resolve_options
from steepest.training.execute import execute
from steepest.training.losses import SquaredError
from steepest.training.optimizers import lbfgs, levenberg_marquardt
from steepest.training.records import RunRecord
from steepest.training.registry import get_optimizer
from steepest.training.source import Source, resolve
from steepest.training.spec import RunSpec

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("torch_levenberg_marquardt") is None,
    reason="torch-levenberg-marquardt is not installed: `make peers`",
)


def run_of(name: str, task: str, epochs: int) -> RunSpec:
    options = resolve_options(resolve(Source(task)), get_optimizer(name), {})
    return RunSpec(task, name, options, epochs=epochs, batch_size=32)


def numbers(record: RunRecord) -> tuple[object, ...]:
    history = [(p.epoch, p.steps, p.train_loss, p.val_loss, p.diagnostics) for p in record.history]
    return record.status, record.final, record.steps, history


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))


@needs_package
def test_levenberg_marquardt_is_the_packages() -> None:
    module = levenberg_marquardt._without_lightning("torch_levenberg_marquardt.training")
    mine, theirs = model_of(), model_of()
    x = torch.linspace(-1, 1, 60).view(20, 3)
    y = x[:, :2].square()
    ours = levenberg_marquardt.LevenbergMarquardt(mine, chunk=None)
    package = module.LevenbergMarquardtModule(theirs, solve_method="cholesky")
    for _step in range(12):
        before = SquaredError().per_sample(mine(x), y).mean()
        assert ours.step(lambda: (SquaredError(), x, y)) == before
        package.training_step(x, y)
    for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)
    assert SquaredError().per_sample(mine(x), y).mean() < 1e-4


@needs_package
def test_levenberg_marquardt_in_chunks_takes_the_same_step() -> None:
    whole, parts = model_of().double(), model_of().double()
    x = torch.linspace(-1, 1, 300, dtype=torch.float64).view(100, 3)
    for model, chunk in ((whole, None), (parts, 7)):
        levenberg_marquardt.LevenbergMarquardt(model, chunk=chunk).step(lambda: (SquaredError(), x, x[:, :2].square()))
    for mine, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


@needs_package
def test_levenberg_marquardt_refuses_what_would_take_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levenberg_marquardt, "_MOST", 100)
    record = execute(run_of("levenberg-marquardt", "diabetes", 1))
    assert record.status == "failed"
    assert "266 residuals and 465 parameters" in str(record.error)


@needs_package
def test_the_package_of_levenberg_marquardt_stays_as_it_was_for_others() -> None:
    levenberg_marquardt._without_lightning("torch_levenberg_marquardt.training")
    assert not [name for name in sys.modules if name.startswith("torch_levenberg_marquardt")]


def test_full_batch_lbfgs_takes_one_step_of_the_whole_split_in_an_epoch() -> None:
    record = execute(run_of("lbfgs-full", "diabetes", 3))
    assert [point.steps for point in record.history] == [0, 1, 2, 3]
    assert record.batch_size == 32
    passes = [point.diagnostics["passes"] for point in record.history[1:]]
    assert passes[0] is not None
    assert passes[-1] is not None
    assert 10 <= passes[0] < passes[1] < passes[-1] <= 60  # type: ignore[operator]


def test_full_batch_lbfgs_spends_its_budget_of_seconds() -> None:
    record = execute(replace(run_of("lbfgs-full", "toy_1d", 1), epochs=None, seconds=0.3))
    assert record.status == "finished", record.error
    assert 0.3 <= record.seconds < 1.5
    assert record.steps == len(record.history) - 1


def test_a_full_batch_in_chunks_is_torchs_own_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lbfgs, "_CHUNK", 7)
    mine, theirs = model_of().double(), model_of().double()
    x = torch.linspace(-1, 1, 300, dtype=torch.float64).view(100, 3)
    y = x[:, :2].square()
    ours = lbfgs.FullBatchLBFGS(mine.parameters())
    own = torch.optim.LBFGS(
        theirs.parameters(), 1.0, 10, 12, 1e-9, 1e-12, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        own.zero_grad()
        loss = SquaredError().per_sample(theirs(x), y).mean()
        torch.autograd.backward(loss)
        return loss.item()

    for _ in range(3):
        before = SquaredError().per_sample(mine(x), y).mean().detach()
        torch.testing.assert_close(lbfgs.chunked_closure_step(ours, mine, SquaredError(), x, y), before)
        own.step(closure)
    for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_a_line_search_is_not_told_how_long_a_step_is() -> None:
    one, other = (execute(replace(run_of("lbfgs-full", "diabetes", 3), schedule=how)) for how in ("linear", "constant"))  # type: ignore[arg-type]
    assert numbers(one) == numbers(other)


def test_a_full_batch_and_a_selection_contradict_each_other() -> None:
    request = Request([Source("digits")], ["sgd", "lbfgs-full"], [0], selections=["random:0.5"])
    with pytest.raises(InvalidOptionError, match="lbfgs-full takes the whole training split"):
        plan_runs(request)


def test_a_full_batch_is_not_shared_by_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InvalidOptionError, match="works in one process"):
        plan_runs(Request([Source("digits")], ["lbfgs-full"], [0]))


@needs_package
def test_levenberg_marquardt_without_a_batch_is_refused() -> None:
    with pytest.raises(ClosureError, match="loss, inputs, targets"):
        levenberg_marquardt.LevenbergMarquardt(model_of()).step()


@needs_package
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"lr=-1\.0"),
        ({"damping": 0.0}, r"damping=0\.0"),
        ({"attempts": 0}, "attempts=0"),
        ({"chunk": 0}, "chunk=0"),
        ({"solver": "svd"}, "solver='svd'"),
        ({"rows": "losses"}, "rows='losses'"),
        ({"damping_mode": "none"}, "damping_mode='none'"),
    ],
)
def test_impossible_options_of_levenberg_marquardt_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        levenberg_marquardt.LevenbergMarquardt(model_of(), **options)  # type: ignore[arg-type]


@needs_package
def test_levenberg_marquardt_on_residuals_of_cross_entropy_fails_with_the_remedy() -> None:
    record = execute(RunSpec("digits", "levenberg-marquardt", {"rows": "residuals"}, epochs=1, batch_size=32))
    assert record.status == "failed"
    assert "use rows='roots'" in str(record.error)
