"""The report: everything in it, nothing from outside, and no name of a user taken for HTML."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from made import make_history, make_problem, make_record
from report.pages import Element, check_harmless, read_page, table_named
from steepest.report.html import render_report, write_report
from steepest.report.measure import Goals
from steepest.training.records import Final, MetricNote, RunRecord

SPECTRUM = tuple(10.0 ** (-place / 4) for place in range(33))
ODD = ("<script>alert(1)</script>", "$x$", "a&b", "\"'", "{{ 7 * 7 }}", "</svg><img src=x onerror=alert(1)>", "]]>")


def diagnosed(record: RunRecord, *, rank: float, spectrum: tuple[float, ...] = ()) -> RunRecord:
    series = {"spectrum": spectrum} if spectrum else {}
    history = (
        record.history[0],
        *(replace(point, diagnostics={"rank": rank, "rows": 64.0}, series=series) for point in record.history[1:]),
    )
    return replace(record, history=history)


def comparison(task: str = "toy_1d") -> list[RunRecord]:
    return [
        diagnosed(
            make_record(task=task, optimizer="sven", seed=seed, loss=1e-6 * (1 + seed)), rank=20, spectrum=SPECTRUM
        )
        for seed in range(3)
    ] + [make_record(task=task, optimizer="adam", seed=seed, loss=1e-3 * (1 + seed)) for seed in range(3)]


LOST = make_record(
    optimizer="sgd",
    status="diverged",
    error="the loss of step 7 is nan",
    final=None,
    history=make_history([1.0, 9.0, None]),
)


def section_text(page: Element) -> str:
    (section,) = page.all("section")
    return " ".join(section.text().split())


def test_a_page_is_well_formed_and_needs_nothing_from_outside() -> None:
    page = render_report([*comparison(), LOST, *comparison("digits")])
    assert page.startswith("<!DOCTYPE html>")
    root = read_page(page)
    check_harmless(page, root)
    assert "://" not in page
    policy = next(meta for meta in root.all("meta") if "http-equiv" in meta.attributes)
    assert policy.attributes["content"] == "default-src 'none'; style-src 'unsafe-inline'"


def test_the_same_records_give_the_same_page() -> None:
    records = [*comparison(), LOST]
    assert render_report(records) == render_report(list(records))


@pytest.mark.parametrize("name", ODD)
def test_what_came_from_a_user_is_text_and_nothing_else(name: str) -> None:
    plain = render_report([*comparison(), LOST])
    problem = make_problem(description=name, loss=name, notes=(name,), model=name, digest=name)
    problem = replace(problem, metrics=(replace(problem.metrics[0], label=name),))
    fields = {"task": name, "problem": problem, "options_source": name, "memory_kind": name, "schedule": name}
    fields |= {"options": {name: name, "nested": {"type": name, name: [name]}}, "environment": {name: name}}
    renamed = [
        replace(record, **fields, optimizer=record.optimizer + name, error=record.error and name)  # type: ignore[arg-type]
        for record in [*comparison(), LOST]
    ]
    page = render_report(renamed, title=name)
    root = read_page(page)
    check_harmless(page, root)
    assert root.one("title").text() == name
    assert root.one("h1").text() == name
    assert root.all("h2")[0].text().strip() == name
    for place in ("Final numbers", "Time to goal", "Options", "Environment", "Runs that did not finish"):
        assert any(" ".join(name.split()) in cell for row in table_named(root, place) for cell in row), place
    drawn = [text.text() for svg in root.all("svg") for text in svg.all("text")]
    assert any(text.startswith("sven") for text in drawn)
    assert len(root.all("svg")) == len(read_page(plain).all("svg"))
    assert len(root.all("td")) >= len(read_page(plain).all("td")) - 10


def test_a_section_says_who_won_and_shows_both_plots() -> None:
    root = read_page(render_report(comparison()))
    text = section_text(root)
    assert "Sven has the lowest mean validation loss, 2.00e-6; Adam is next with 0.00200, 1,000 times as much." in text
    captions = [caption.text() for caption in root.all("figcaption")]
    assert captions[:2] == [
        "Validation squared error against epochs",
        "Validation squared error against seconds of training",
    ]
    plots = [svg for svg in root.all("svg") if svg.attributes.get("role") == "img"]
    assert "Sven 2.00e-6, Adam 0.00200" in plots[0].attributes["aria-label"]
    drawn = [text.text() for text in plots[0].all("text")]
    assert {"Sven", "Adam", "goal 0.00300", "epochs"} <= set(drawn)


def test_plots_take_their_colours_and_fonts_from_the_page() -> None:
    root = read_page(render_report(comparison()))
    css = root.one("style").text()
    styles = [node.attributes["style"] for svg in root.all("svg") for node in svg.all() if "style" in node.attributes]
    used = {name for style in styles for name in re.findall(r"var\((--[\w-]+)\)", style)}
    assert {"--ink", "--muted", "--rule", "--series-0", "--series-0-text", "--series-1"} <= used | {"--ink"}
    assert all(css.count(f"{name}: #") == 2 for name in used), "one value for light and one for dark"
    # What is left of fixed colours is what cannot be seen.
    assert not [style for style in styles if re.search(r"(?:fill|stroke): #(?!ffffff)", style)]
    assert not any("font-family" in style or "DejaVu" in style for style in styles)


def test_final_numbers_mark_the_best_not_by_colour_alone() -> None:
    table = table_named(read_page(render_report([*comparison(), LOST])), "Final numbers")
    assert table[0] == [
        "optimizer", "val loss", "test loss", "test R2", "seconds", "ms/step", "steps", "peak memory", "finished",
    ]  # fmt: skip
    sven, adam, sgd = table[1:]
    assert sven[1] == "2.00e-6 ± 1.0e-6★"
    assert adam[1] == "0.00200 ± 0.0010"
    assert sgd[1:] == ["-"] * 7 + ["0/1 (1 diverged)"]


def test_time_to_goal_tells_goal_resolution_and_ratio() -> None:
    root = read_page(render_report(comparison(), goals=Goals({"toy_1d": 0.05})))
    sven, adam = table_named(root, "Time to goal")[1:]
    assert sven == ["Sven", "3/3", "1", "0.667", "0.50 ×"]
    assert adam == ["Adam", "3/3", "2", "1.33", "1.0 ×"]
    slow = read_page(render_report([*comparison(), make_record(optimizer="adam", seed=3, seconds=4.0)]))
    assert table_named(slow, "Time to goal")[0][4] == "range of seconds"
    assert table_named(slow, "Time to goal")[2][4] == "1.33 to 4.00"
    text = section_text(root)
    assert "The goal is a validation loss of 0.0500: given by the user." in text
    assert "right to within one epoch" in text


def test_kept_rank_and_spectrum_are_drawn_and_explained() -> None:
    root = read_page(render_report(comparison()))
    text = section_text(root)
    assert "Used at the end: Sven 20 of 64." in text
    assert "At epoch 3 Sven's smallest singular value is 1.00e-8 of the largest." in text
    assert [caption.text() for caption in root.all("figcaption")][2:] == [
        "Directions that a step uses (kept rank)",
        "Singular values of Sven, divided by the largest",
    ]
    drawn = [text.text() for text in root.all("svg")[-1].all("text")]
    assert {"epoch 1", "epoch 2", "epoch 3"} <= set(drawn)


def test_a_damped_solver_is_said_to_use_everything() -> None:
    records = [diagnosed(make_record(optimizer="sven"), rank=64), make_record(optimizer="adam")]
    root = read_page(render_report(records))
    assert "Sven uses all 64 directions of a batch in every step" in section_text(root)
    assert "none was recorded" in section_text(root)
    assert len(root.all("figure")) == 2
    with_spectrum = [diagnosed(records[0], rank=64, spectrum=SPECTRUM), records[1]]
    root = read_page(render_report(with_spectrum))
    assert "none was recorded" not in section_text(root)
    assert len(root.all("figure")) == 3


def test_any_optimizer_may_report_a_rank() -> None:
    root = read_page(render_report([diagnosed(make_record(optimizer="unheard_of"), rank=5, spectrum=(1.0, 0.5, 0.0))]))
    assert "unheard_of 5 of 64" in section_text(root)
    assert "unheard_of's smallest singular value is 0 of the largest" in section_text(root)


def test_runs_that_did_not_finish_are_listed_and_drawn() -> None:
    root = read_page(render_report([*comparison(), LOST]))
    assert table_named(root, "Runs that did not finish")[1] == [
        "SGD",
        "0",
        "diverged",
        "2",
        "the loss of step 7 is nan",
    ]
    assert "A dotted line with a cross is a run that did not finish" in section_text(root).replace(
        "; a dotted", ". A dotted"
    )
    without = read_page(render_report(comparison()))
    assert "Runs that did not finish" not in without.text()
    assert len(root.all("figure")[0].all("path")) > len(without.all("figure")[0].all("path"))


def test_settings_and_options_are_told() -> None:
    own = make_record(optimizer="sgd", options={"lr": 1e-5, "nesterov": True}, options_source="set by the user: lr")
    root = read_page(render_report([*comparison(), own]))
    text = section_text(root)
    for words in (
        "593",
        "100 training, 50 validation, 50 test",
        "32 samples",
        "3 epochs",
        "falls linearly to 0",
        "0, 1, 2",
    ):
        assert words in text
    rows = table_named(root, "Options")
    assert rows[3] == ["SGD", "lr=1e-5, nesterov=true", "set by the user: lr", "0"]
    same = read_page(render_report(comparison()))
    assert "How the options were chosen: chosen by hand." in section_text(same)


def test_environments_that_differ_are_told() -> None:
    assert "not all made in the same environment" not in render_report(comparison())
    other = [replace(record, environment={**record.environment, "cpu": "another"}) for record in comparison()[:2]]
    root = read_page(render_report([*other, *comparison()[2:]]))
    assert "not all made in the same environment" in root.text()
    assert ["cpu", "another (2 runs); a processor (4 runs)"] in table_named(root, "Environment")


def test_a_goal_by_a_metric_has_curves_of_its_own_with_its_line() -> None:
    def improving(record: RunRecord) -> RunRecord:
        points = (replace(point, val_metrics={"r2": 0.3 * point.epoch}) for point in record.history)
        return replace(record, history=tuple(points))

    records = [improving(record) for record in comparison()]
    root = read_page(render_report(records, goals=Goals({"toy_1d": 0.55}, "r2")))
    assert [caption.text() for caption in root.all("figcaption")][:4] == [
        "Validation squared error against epochs",
        "Validation squared error against seconds of training",
        "Validation R2 against epochs",
        "Validation R2 against seconds of training",
    ]
    drawn = [{text.text() for text in figure.all("text")} for figure in root.all("figure")]
    assert ["goal 0.550" in texts for texts in drawn[:4]] == [False, False, True, True]
    assert "Medians at the end: Sven 0.900, Adam 0.900." in root.all("figure")[2].one("svg").attributes["aria-label"]
    # A ratio has an even axis, from the untrained model's 0.
    assert {"0", "0.25", "0.5", "0.75"} <= drawn[2]
    sven, adam = table_named(root, "Time to goal")[1:]
    assert sven == ["Sven", "3/3", "2", "1.33", "1.0 ×"]
    assert adam == ["Adam", "3/3", "2", "1.33", "1.0 ×"]
    text = section_text(root)
    assert "The goal is a validation R2 of 0.550: given by the user." in text
    assert "at the first evaluation at or above it" in text


def test_the_line_of_a_goal_by_a_metric_is_shown_however_far_it_is() -> None:
    root = read_page(render_report(comparison(), goals=Goals({"toy_1d": 0.99}, "r2")))
    drawn = [{text.text() for text in figure.all("text")} for figure in root.all("figure")]
    assert "goal 0.990" in drawn[2]


def test_all_metrics_are_columns_the_main_one_first() -> None:
    metrics = (MetricNote("r2", "R2", higher_is_better=True), MetricNote("mae", "MAE", higher_is_better=False))
    records = [
        make_record(
            optimizer=name,
            problem=make_problem(metrics=metrics),
            final=Final(0.1, 0.1, {}, {"r2": 0.8, "mae": mae}),
        )
        for name, mae in (("sven", 0.25), ("adam", 0.5))
    ]
    table = table_named(read_page(render_report(records)), "Final numbers")
    assert table[0][3:6] == ["test R2", "test MAE", "seconds"]
    assert [row[4] for row in table[1:]] == ["0.2500★", "0.5000"]


def test_several_sections_have_an_overview_that_leads_to_them() -> None:
    root = read_page(render_report([*comparison(), *comparison("digits"), make_record(task="digits", epochs=9)]))
    rows = table_named(root, "Overview")
    assert [row[0] for row in rows[1:]] == ["toy_1d", "digits (epochs 3)", "digits (epochs 9)"]
    assert rows[1][1:3] == ["Sven", "2.00e-6"]
    assert [link.attributes["href"] for link in root.all("a")] == ["#section-1", "#section-2", "#section-3"]
    assert "Overview" not in render_report(comparison())


def test_one_run_of_one_optimizer_is_a_report() -> None:
    root = read_page(render_report([make_record()]))
    assert root.one("h1").text() == "SGD on toy_1d"
    assert "SGD ends at a validation loss of 0.100." in section_text(root)
    assert "1 run, finished." in root.one("header").text()
    assert "Time to goal" not in root.text()
    assert not root.all("ul"), "a legend of one line says nothing"


@pytest.mark.parametrize(
    "records",
    [
        [],
        [LOST],
        [replace(LOST, history=(), samples=None, num_parameters=None, status="failed", error=None)],
        [make_record(history=make_history([1.0]))],
        [make_record(history=make_history([None, None])), make_record(optimizer="adam")],
        [make_record(loss=0.0), make_record(optimizer="adam", loss=-1.0)],
        [make_record(seed=seed, peak_memory=None, fingerprint=None) for seed in range(2)],
        [replace(make_record(seed=seed), epochs=None, budget_seconds=2.5, schedule="constant") for seed in range(2)],
        [make_record(task="theirs", problem=make_problem(metrics=(), digest="0123456789abcdef0"))],
        [replace(LOST, history=make_history([1.0, 1e300, 1e-300])), make_record(optimizer="adam")],
        [make_record(optimizer="sven", options={"lr": rate}, seed=seed) for rate in range(1, 31) for seed in range(2)],
        [diagnosed(make_record(optimizer="x", epochs=1), rank=3, spectrum=(0.0, 0.0))],
        [diagnosed(LOST, rank=3, spectrum=SPECTRUM)],
    ],
    ids=[
        "none", "diverged", "failed at once", "one point", "not finite", "zero and below", "no memory", "seconds",
        "no metric", "enormous", "thirty rows", "no spectrum", "diverged with spectrum",
    ],
)  # fmt: skip
def test_odd_records_still_make_a_page(records: list[RunRecord]) -> None:
    page = render_report(records)
    root = read_page(page)
    check_harmless(page, root)
    assert ">nan<" not in page
    assert len(root.all("section")) == len({record.epochs for record in records})


def test_of_many_rows_eight_have_colours() -> None:
    root = read_page(
        render_report([make_record(optimizer="sven", options={"lr": rate}, loss=rate / 100) for rate in range(1, 31)])
    )
    legend = [item.text() for item in root.one("ul").all("li")]
    assert legend == [f"Sven lr={rate}" for rate in range(1, 9)] + ["22 others"]
    assert len(table_named(root, "Final numbers")) == 31


def test_labels_that_would_look_the_same_are_left_to_the_legend() -> None:
    def drawn(options: list[dict[str, object]]) -> list[str]:
        root = read_page(render_report([make_record(optimizer="sgd", options=chosen) for chosen in options]))
        assert "SGD learning_rate_of_all=2" in root.one("ul").text()
        return [text.text() for svg in root.all("svg") for text in svg.all("text")]

    pairs = ((1, 3), (2, 3), (1, 4))  # the first two differ in their midst alone
    alike = drawn([{"learning_rate_of_all": rate, "something_of_others": other} for rate, other in pairs])
    assert not any("…" in text for text in alike)
    cut = [text for text in drawn([{"learning_rate_of_all": rate} for rate in (1, 2)]) if "…" in text]
    assert len(cut) == 4
    assert len(set(cut)) == 2


def test_a_page_is_written_whole_into_a_new_folder(tmp_path: Path) -> None:
    path = write_report(comparison(), tmp_path / "new" / "r.html", title="Ours")
    assert read_page(path.read_text(encoding="utf-8")).one("h1").text() == "Ours"
    assert [file.name for file in path.parent.iterdir()] == ["r.html"]
