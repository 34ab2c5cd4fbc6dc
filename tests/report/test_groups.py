"""Which records stand beside each other."""

from __future__ import annotations

import pytest

from made import make_problem, make_record
from steepest.report.groups import group


def test_tasks_keep_their_order() -> None:
    assert [cell.task for cell in group([make_record(task="toy_1d"), make_record(task="diabetes")])] == [
        "toy_1d",
        "diabetes",
    ]


ENVIRONMENT = dict(make_record().environment)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"problem": make_problem(digest="abcdefgh12")}, "contents abcdefgh"),
        ({"problem": make_problem(model="mlp:64")}, "model mlp:64"),
        ({"problem": make_problem(notes=("the target is price",))}, "notes the target is price"),
        ({"data_seed": 1}, "data seed 1"),
        ({"epochs": 5}, "epochs 5"),
        ({"budget_seconds": 2.5}, "seconds 2.5"),
        ({"schedule": "constant"}, "schedule constant"),
        ({"batch_size": 64}, "batch 64"),
        ({"environment": {**ENVIRONMENT, "device": "cuda"}}, "device cuda"),
        ({"environment": {**ENVIRONMENT, "threads": 2}}, "threads 2"),
        ({"environment": {**ENVIRONMENT, "torch": "2.14"}}, "torch 2.14"),
        ({"environment": {**ENVIRONMENT, "steepest": "0.2"}}, "steepest 0.2"),
    ],
)
def test_runs_under_other_conditions_are_apart_and_the_heading_says_why(change: dict[str, object], words: str) -> None:
    first, second = group([make_record(), make_record(optimizer="adam", **change)])  # type: ignore[arg-type]
    assert words in second.variant
    assert first.title != second.title
    assert first.stem != second.stem


def test_another_processor_or_commit_does_not_part_runs() -> None:
    other = make_record(seed=1, environment={**ENVIRONMENT, "cpu": "another", "commit": "abc"})
    (cell,) = group([make_record(), other])
    assert cell.variant == ""
    assert len(cell.rows) == 1


def test_a_row_is_an_optimizer_with_its_options_and_told_by_those_that_differ() -> None:
    options = [
        {"lr": 0.1, "solver": {"type": "Damped", "damping": 0.1}},
        {"lr": 0.5, "solver": {"type": "Damped", "damping": 0.1}},
    ]
    (cell,) = group([
        *(make_record(optimizer="sven", options=chosen, seed=seed) for seed in (1, 0) for chosen in options),
        make_record(optimizer="adam"),
    ])
    assert [row.label for row in cell.rows] == ["Sven lr=0.1", "Sven lr=0.5", "Adam"]
    assert [record.seed for record in cell.rows[0].records] == [0, 1]


def test_options_inside_of_options_and_missing_ones_are_told() -> None:
    options = [
        {"lr": 0.1},
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "solver": {"type": "Damped", "damping": 0.2}},
        {"lr": 0.1, "solver": {"type": "Damped", "damping": 0.3}},
    ]
    (cell,) = group([make_record(optimizer="sgd", options=chosen) for chosen in options])
    assert [row.label for row in cell.rows] == [
        "SGD momentum=default, solver=default",
        "SGD momentum=0.9, solver=default",
        "SGD momentum=default, solver=Damped, solver.damping=0.2",
        "SGD momentum=default, solver=Damped, solver.damping=0.3",
    ]


def test_names_of_files_are_safe_and_differ() -> None:
    stems = [cell.stem for cell in group([make_record(task="../../<x>"), make_record(task="a b")])]
    assert all("/" not in stem and "<" not in stem and not stem.startswith(".") for stem in stems)
    assert len(set(stems)) == 2
