"""Plans, resuming, tuning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from made import make_record
from steepest.errors import InvalidOptionError
from steepest.training.compare import Request, plan_runs, run_all
from steepest.training.errors import RecordError
from steepest.training.execute import execute
from steepest.training.records import EpochPoint, Final, RecordStore, RunRecord, Status
from steepest.training.registry import get_optimizer
from steepest.training.source import Source
from steepest.training.spec import RunSpec
from steepest.training.tune import TUNING_SEEDS, apply_choices, choose, log_grid, tuning_runs

REQUEST = Request(tasks=[Source("diabetes"), Source("toy_1d")], optimizers=["sgd", "adam"], seeds=[0, 1], epochs=1)

TASKS = ["diabetes", "toy_1d"]


class Log:
    def __init__(self) -> None:
        self.started: list[str] = []
        self.resumed: list[str] = []

    def run_started(self, spec: RunSpec, number: int, total: int) -> None:
        del number, total
        self.started.append(f"{spec.optimizer}{spec.seed}")

    def epoch_done(self, spec: RunSpec, point: EpochPoint) -> None:
        pass

    def run_done(self, spec: RunSpec, record: RunRecord, *, resumed: bool) -> None:
        del record
        if resumed:
            self.resumed.append(f"{spec.optimizer}{spec.seed}")


def test_optimizers_take_turns() -> None:
    specs = plan_runs(REQUEST)
    assert [(s.task[0], s.seed, s.optimizer) for s in specs] == [
        (task, seed, optimizer) for task in "dt" for seed in (0, 1) for optimizer in ("sgd", "adam")
    ]


def test_a_plan_has_one_budget_batch_size_and_schedule_per_task() -> None:
    for task in TASKS:
        specs = [spec for spec in plan_runs(REQUEST) if spec.task == task]
        assert len({(s.epochs, s.seconds, s.batch_size, s.schedule, s.data_seed) for s in specs}) == 1


def test_seconds_replace_the_tasks_own_epochs() -> None:
    (spec,) = plan_runs(Request([Source("toy_1d")], ["sgd"], [0], seconds=2.0))
    assert (spec.epochs, spec.seconds) == (None, 2.0)
    (spec,) = plan_runs(Request([Source("toy_1d")], ["sgd"], [0]))
    assert (spec.epochs, spec.seconds) == (20, None)


def test_what_the_user_sets_wins_over_what_is_stored() -> None:
    request = replace(REQUEST, options={"sgd": {"lr": 0.123}})
    rates = {spec.options.get("lr") for spec in plan_runs(request) if spec.optimizer == "sgd"}
    assert rates == {0.123}
    assert all(spec.options["momentum"] == 0.9 for spec in plan_runs(request) if spec.optimizer == "sgd")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": []}, "no task was named"),
        ({"tasks": [Source("toy_1d")] * 2}, "named twice"),
        ({"optimizers": ["sgd", "sgd"]}, "named twice"),
        ({"tasks": [Source("toy")]}, "did you mean 'toy_1d'"),
        ({"optimizers": ["swen"]}, "did you mean 'sven'"),
        ({"seeds": []}, "no seed was given"),
        ({"epochs": 0}, "the epochs is 0: it must be a finite number above 0"),
        ({"seconds": -1.0}, "budget of seconds is -1.0"),
        ({"seconds": float("nan")}, "budget of seconds is nan"),
        ({"batch_sizes": [10_000_000]}, "above the 266 training samples"),
        ({"options": {"lbfgs": {"lr": 1.0}}}, "'lbfgs', which is not compared"),
        ({"options": {"sgd": {"lr": -1.0}}}, "sgd does not take these options: Invalid learning rate"),
        ({"options": {"sgd": {"moment": 0.5}}}, "did you mean 'momentum'"),
        ({"options": {"adam": {"betas": (2.0, 0.9)}}}, "adam does not take these options"),
    ],
)
def test_an_impossible_request_is_refused_before_anything_runs(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidOptionError) as caught:
        plan_runs(replace(REQUEST, **changes))  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_finished_runs_are_not_repeated(tmp_path: Path) -> None:
    specs = plan_runs(replace(REQUEST, tasks=[Source("diabetes")]))
    first, second = Log(), Log()
    before = run_all(specs[:2], RecordStore(tmp_path), first, execute)
    after = run_all(specs, RecordStore(tmp_path), second, execute)
    assert first.started == ["sgd0", "adam0"]
    assert second.resumed == ["sgd0", "adam0"]
    assert second.started == ["sgd1", "adam1"]
    assert after[:2] == before
    everything = Log()
    run_all(specs, RecordStore(tmp_path), everything, execute, fresh=True)
    assert everything.started == ["sgd0", "adam0", "sgd1", "adam1"]


@pytest.mark.parametrize(
    ("status", "again"), [("finished", False), ("diverged", False), ("failed", True), ("timed_out", True)]
)
def test_results_are_kept_and_accidents_are_tried_again(tmp_path: Path, status: Status, again: bool) -> None:
    specs = plan_runs(Request([Source("diabetes")], ["sgd"], [0], epochs=1))
    store, log = RecordStore(tmp_path), Log()
    store.write(specs[0], make_record(task="diabetes", status=status))
    run_all(specs, store, log, execute)
    assert bool(log.started) is again


def test_an_interrupt_leaves_the_finished_runs(tmp_path: Path) -> None:
    specs = plan_runs(replace(REQUEST, tasks=[Source("diabetes")]))

    def interrupted(spec: RunSpec, on_epoch: Callable[[EpochPoint], None]) -> RunRecord:
        if spec == specs[2]:
            raise KeyboardInterrupt
        return execute(spec, on_epoch)

    with pytest.raises(KeyboardInterrupt):
        run_all(specs, RecordStore(tmp_path), Log(), interrupted)
    assert len(RecordStore(tmp_path).read_all()) == 2


def test_a_corrupt_record_among_good_ones_is_named_and_nothing_is_lost(tmp_path: Path) -> None:
    specs = plan_runs(replace(REQUEST, tasks=[Source("diabetes")]))
    store = RecordStore(tmp_path)
    run_all(specs, store, Log(), execute)
    store.path(specs[2]).write_text("{")
    with pytest.raises(RecordError, match=str(store.path(specs[2]).name)):
        run_all(specs, store, Log(), execute)
    assert len(list(tmp_path.glob("*.jsonl"))) == 4
    assert store.read(specs[3]) is not None


def test_every_optimizer_gets_the_same_number_of_trials_on_seeds_of_their_own() -> None:
    specs = plan_runs(REQUEST)
    trials = tuning_runs(specs, 4)
    assert {spec.seed for spec in trials} == set(TUNING_SEEDS)
    for task, name, seed in product(TASKS, REQUEST.optimizers, TUNING_SEEDS):
        rates = [s.options["lr"] for s in trials if (s.task, s.optimizer, s.seed) == (task, name, seed)]
        low, high = get_optimizer(name).lr_range
        assert rates == log_grid(low, high, 4)
        assert (rates[0], rates[-1]) == (low, high)


def _trial(lr: float, val: float, test: float, status: Status = "finished") -> RunRecord:
    return make_record(options={"lr": lr}, final=Final(val, test, {}, {}), status=status)


def test_the_choice_looks_at_validation_only() -> None:
    (choice,) = choose([_trial(0.1, 0.5, 0.1), _trial(0.2, 0.4, 0.9)])
    assert (choice.lr, choice.val_loss, choice.finished, choice.runs) == (0.2, 0.4, 2, 2)
    specs = apply_choices([RunSpec("toy_1d", "sgd", {"lr": 1.0, "momentum": 0.9}), RunSpec("toy_1d", "adam")], [choice])
    assert specs[0].options == {"lr": 0.2, "momentum": 0.9}
    assert specs[1].options == {}


def test_a_rate_that_diverges_on_a_seed_is_not_chosen() -> None:
    lucky = [_trial(0.3, 0.01, 0.01), _trial(0.3, 9.0, 9.0, "diverged")]
    steady = [_trial(0.1, 0.5, 0.5), _trial(0.1, 0.3, 0.3)]
    (choice,) = choose(lucky + steady)
    assert (choice.lr, choice.finished, choice.runs) == (0.1, 3, 4)
    assert choice.val_loss == pytest.approx(0.4)


def test_where_no_trial_finishes_the_stored_rate_stays() -> None:
    (choice,) = choose([_trial(0.1, 0.5, 0.1, "diverged")])
    assert choice.lr is None
    assert apply_choices([RunSpec("toy_1d", "sgd", {"lr": 1.0})], [choice])[0].options == {"lr": 1.0}


def test_tuning_seeds_are_not_reported_and_trials_are_counted() -> None:
    with pytest.raises(InvalidOptionError, match="are for tuning"):
        tuning_runs([RunSpec("toy_1d", "sgd", seed=TUNING_SEEDS[0])], 3)
    with pytest.raises(InvalidOptionError, match="at least 1"):
        tuning_runs([RunSpec("toy_1d", "sgd")], 0)


def test_a_large_batch_study_compares_every_size_by_itself() -> None:
    request = Request([Source("diabetes")], ["sgd", "adam"], [0], epochs=1, batch_sizes=[32, 64, "all"])
    specs = plan_runs(request)
    assert [(spec.batch_size, spec.optimizer) for spec in specs] == [
        (size, name) for size in (32, 64, 266) for name in ("sgd", "adam")
    ]
    # The stored learning rates are the task's own batch size's.
    assert [spec.untuned for spec in specs] == [False, False, True, True, True, True]
    trials = tuning_runs(specs, 2)
    assert len({(spec.batch_size, spec.optimizer, spec.options["lr"]) for spec in trials}) == 12
    records = [
        make_record(options={"lr": lr}, batch_size=size, loss=lr) for size in (32, 64) for lr in (0.1, 0.01 * size)
    ]
    assert [(choice.batch_size, choice.lr) for choice in choose(records)] == [(32, 0.1), (64, 0.1)]


def test_a_batch_size_is_named_once() -> None:
    with pytest.raises(InvalidOptionError, match="give each size once"):
        plan_runs(Request([Source("diabetes")], ["sgd"], [0], epochs=1, batch_sizes=[266, "all"]))
