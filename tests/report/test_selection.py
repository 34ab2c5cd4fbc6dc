"""The page of a selection: what it says, what it shows, and that nothing of a user's is taken for HTML."""

from __future__ import annotations

import base64
import io
import math
import re
from dataclasses import replace

import pytest
import torch
from matplotlib.image import imread
from torch import Tensor, nn

from report.pages import Element, read_page, table_named
from steepest.report.measure import LOSS, Measure
from steepest.report.selection import render_selection, write_selection_page
from steepest.report.selection_check import ARMS, Check, CheckRun, check_grid, check_verdict
from steepest.report.selection_examples import examples
from steepest.report.selection_words import Scorer, Selected, cost_words, meanings, paid_after, wrong_words
from steepest.selection import Selection, SelectionReport
from steepest.training.data import Split, Splits
from steepest.training.losses import CrossEntropy
from steepest.training.metrics import ACCURACY
from steepest.training.task import Task

ODD = ("<script>alert(1)</script>", "$x$", "a&b", "\"'", "{{ 7 * 7 }}", "</svg><img src=x onerror=alert(1)>", "]]>")
METRIC = Measure("accuracy", "accuracy", higher_is_better=True)
NUMBERS = {"certificate": 12.0, "certificate_relative": 0.0123, "squared_norm": 975.6, "sketch_rank": 64.0}


def task(**changes: object) -> Task:
    made = Task(
        name="pictures",
        description="small pictures",
        kind="classification",
        load=lambda _seed: splits(torch.rand(60, 1, 4, 5)),
        model=lambda shape: nn.Linear(shape.features, shape.outputs),
        loss=CrossEntropy(),
        metrics=(ACCURACY,),
        batch_size=4,
        epochs=1,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def splits(inputs: Tensor, targets: Tensor | None = None, **scaling: Tensor) -> Splits:
    part = Split(inputs, torch.arange(len(inputs)) % 3 if targets is None else targets)
    return Splits(part, part, part, scaling=scaling)


def chosen(
    data: Splits,
    *,
    scores: Tensor | None = None,
    wrong: Tensor | None = None,
    check: Check | None = None,
    **about: object,
) -> Selected:
    """Sample i has the score i / N, and the last sixth is kept."""
    total = len(data.train)
    kept = total // 6
    targets = data.train.targets
    labels = None if targets.is_floating_point() else targets
    indices = torch.arange(total - kept, total)
    counts = None
    if labels is not None:
        counts = {c: (int((labels[indices] == c).sum()), int((labels == c).sum())) for c in range(3)}
    report = SelectionReport(
        seconds=3.0,
        passes=2,
        class_counts=counts,
        mean_cosine=0.25,
        duplicates=2,
        numbers=NUMBERS,
        notes=("Look at this.",),
        kept=kept,
        num_samples=total,
    )
    selection = Selection(
        indices=indices,
        scores=torch.arange(total) / total if scores is None else scores,
        weights=torch.ones(kept),
        labels=labels,
        method="sage",
        options={"sketch_size": 64, "rule": {"type": "Strata", "tail_cut": 0.2}},
        num_samples=total,
        fingerprint="ab" * 32,
        model_hash="cd" * 32,
        report=report,
    )
    made = Selected(
        selection=selection,
        task=task(),
        splits=data,
        scorer=Scorer("a new model after 2 epochs", 2.0),
        epoch_seconds=1.2,
        environment={"python": "3.12"},
        wrong=wrong,
        check=check,
    )
    return replace(made, **about)  # type: ignore[arg-type]


def pictures(**about: object) -> Selected:
    return chosen(splits(torch.rand(60, 1, 4, 5, generator=torch.Generator().manual_seed(0))), **about)  # type: ignore[arg-type]


def checked(subset: list[float], random: list[float], everything: list[float], measure: Measure = METRIC) -> Check:
    runs = tuple(
        CheckRun(arm, seed, val_loss=value if math.isfinite(value) else None, val_metric=value, seconds=10.0)
        if math.isfinite(value)
        else CheckRun(arm, seed, None, None, 1.0)
        for arm, values in zip(ARMS, (subset, random, everything), strict=True)
        for seed, value in enumerate(values)
    )
    return Check(runs, "sage", 10, 60, 15, "AdamW", measure, balanced=True, cost=5.0)


def words_of(page: Element) -> str:
    return " ".join(page.one("main").text().split())


def test_a_page_is_well_formed_and_needs_nothing_from_outside() -> None:
    page = render_selection(pictures(check=checked([0.7, 0.8], [0.6, 0.5], [0.9, 0.9])))
    assert page.startswith("<!DOCTYPE html>")
    root = read_page(page)
    assert "://" not in page
    assert "@import" not in root.one("style").text()
    policy = next(meta for meta in root.all("meta") if "http-equiv" in meta.attributes)
    assert policy.attributes["content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert not root.all("script")
    assert all(image.attributes["src"].startswith("data:image/png;base64,") for image in root.all("img"))
    assert all(image.attributes["alt"] for image in root.all("img"))
    identifiers = [element.attributes["id"] for element in root.all() if "id" in element.attributes]
    assert len(identifiers) == len(set(identifiers))
    for name in re.findall(r"var\((--[\w-]+)\)", page):
        assert root.one("style").text().count(f"{name}:") == 2, f"{name} has no value for light and for dark"


def test_the_same_selection_gives_the_same_page() -> None:
    assert render_selection(pictures()) == render_selection(pictures())


def test_the_page_says_what_was_kept_what_it_cost_and_when_it_has_paid() -> None:
    page = words_of(read_page(render_selection(pictures())))
    assert "sage kept 10 of 60 training samples, 16.7 %." in page
    assert "The selection took 5.00 s (2.00 s of it to train the scorer), as long as 4.2 epochs" in page
    assert "A pass over the subset saves 1.00 s of 1.20 s" in page
    assert "it has paid after 5.0 epochs" in page
    assert "Look at this." in page
    assert "certificate" not in page.lower().replace("certificate of the sketch", "")
    assert "1.23 %" in page
    assert "Strata(tail_cut=0.2)" in page


def test_it_has_paid_when_the_saved_time_is_the_time_it_took() -> None:
    selected = pictures()
    share = len(selected.selection) / selected.selection.num_samples
    assert paid_after(selected) * (1 - share) * selected.epoch_seconds == pytest.approx(5.0)
    everything = replace(selected.selection, indices=torch.arange(60), weights=torch.ones(60))
    whole = replace(selected, selection=everything)
    assert paid_after(whole) == math.inf
    assert cost_words(whole)[-1] == "It left nothing out, so it saves nothing."


def test_classes_are_listed_with_all_and_kept_samples() -> None:
    page = read_page(render_selection(pictures(task=task(classes=("cat", "dog", "owl")))))
    rows = table_named(page, "Classes")
    assert rows[0] == ["class", "samples", "kept", "share"]
    assert [row[0] for row in rows[1:]] == ["cat", "dog", "owl"]
    assert sum(int(row[2]) for row in rows[1:]) == 10
    labels = [svg.attributes["aria-label"] for svg in page.all("svg") if "aria-label" in svg.attributes]
    assert any("cat" in label for label in labels)


def test_a_hundred_classes_have_a_figure_and_no_table() -> None:
    data = splits(torch.rand(600, 7), torch.arange(600) % 100)
    selected = chosen(data)
    counts = dict.fromkeys(range(100), (1, 6))
    report = replace(selected.selection.report, class_counts=counts)
    page = read_page(render_selection(replace(selected, selection=replace(selected.selection, report=report))))
    assert not [box for box in page.all("div") if box.attributes.get("aria-label") == "Classes"]
    assert any("of the kept samples and of all" in caption.text() for caption in page.all("figcaption"))


def test_both_ends_of_the_scores_are_shown_with_what_was_kept() -> None:
    high, low = examples(pictures())
    assert [example.position for example in high.pictures] == list(range(59, 49, -1))
    assert [example.position for example in low.pictures] == list(range(10))
    assert all(example.kept for example in high.pictures)
    assert not any(example.kept for example in low.pictures)


@pytest.mark.parametrize("scale", [1.0, 255.0])
def test_a_picture_is_that_of_the_sample_before_it_was_standardised(scale: float) -> None:
    raw = torch.rand(60, 3, 4, 5, generator=torch.Generator().manual_seed(0)) * scale
    mean, deviation = raw.mean(dim=(0, 2, 3)).reshape(3, 1, 1), raw.std(dim=(0, 2, 3)).reshape(3, 1, 1)
    data = splits((raw - mean) / deviation, input_mean=mean, input_scale=deviation)
    high, _ = examples(chosen(data))
    for example in high.pictures:
        content = base64.b64decode(example.source.partition(",")[2])
        seen = torch.tensor(imread(io.BytesIO(content)))[..., :3].movedim(-1, 0)
        assert torch.allclose(seen, raw[example.position] / scale, atol=1.5 / 255)


def test_digits_as_rows_of_64_numbers_are_pictures_and_named_columns_are_not() -> None:
    data = splits(torch.rand(60, 64))
    assert examples(chosen(data))[0].pictures
    assert not examples(chosen(data, task=task(features=tuple(f"c{i}" for i in range(64)))))[0].pictures
    assert not examples(chosen(splits(torch.rand(60, 9))))[0].pictures


def test_samples_that_are_no_pictures_are_rows_of_numbers() -> None:
    data = splits(torch.rand(60, 3), torch.linspace(0, 1, 60).unsqueeze(1))
    selected = chosen(data, task=task(kind="regression", features=("age", "height", "weight")))
    rows = table_named(read_page(render_selection(selected)), "Highest scores")
    assert rows[0] == ["sample", "score", "kept", "target", "age", "height", "weight"]
    assert rows[1][:4] == ["59", "0.983", "yes", "1"]
    assert len(rows) == 11


def test_scores_that_are_missing_or_not_finite_do_no_harm() -> None:
    data = splits(torch.rand(60, 1, 4, 5))
    scores = torch.arange(60) / 60
    scores[::2] = math.nan
    high, _ = examples(chosen(data, scores=scores))
    assert [example.position for example in high.pictures] == list(range(59, 39, -2))
    none = chosen(data)
    none = replace(none, selection=replace(none.selection, scores=None))
    assert examples(none) == []
    assert "Both ends" not in render_selection(none)
    assert render_selection(chosen(data, scores=torch.zeros(60)))


def test_wrong_labels_are_counted_and_marked() -> None:
    wrong = torch.zeros(60, dtype=torch.bool)
    wrong[:11] = True
    wrong[59] = True
    selected = pictures(wrong=wrong)
    assert wrong_words(selected) == (
        "20 % of the training labels are known to be wrong (12). Of these, 91.7 % were dropped: 1 is left, 10 % of "
        "the subset; chance would leave about 2. The method was not told which."
    )
    page = read_page(render_selection(selected))
    marks = [span for span in page.all("span") if span.attributes.get("class") == "wrong"]
    assert len(marks) == 11
    assert wrong_words(pictures(wrong=torch.zeros(60, dtype=torch.bool))) == ""


def test_numbers_are_explained_and_those_that_are_not_finite_left_out() -> None:
    report = replace(pictures().selection.report, numbers={**NUMBERS, "odd": math.nan})
    assert {name: value for name, value, _ in meanings(report)} == {
        "Mean cosine of kept gradients": "0.250",
        "Duplicates": "2",
        "Certificate of the sketch": "1.23 %",
        "Sketch rank": "64",
    }
    assert meanings(SelectionReport(seconds=0.0)) == []


def test_nothing_of_a_user_is_taken_for_html() -> None:
    for odd in ODD:
        odd_task = task(name=odd, description=odd, classes=(odd, odd, odd))
        selected = pictures(task=odd_task, scorer=Scorer(odd), environment={odd: odd})
        report = replace(selected.selection.report, notes=(odd,), numbers={odd: 1.0})
        selection = replace(selected.selection, method=odd, options={odd: odd}, report=report)
        root = read_page(render_selection(replace(selected, selection=selection), title=odd))
        assert root.one("title").text() == odd
        assert not root.all("script")
        assert not [element for element in root.all() if "onerror" in element.attributes]
        rows = table_named(root, "Classes")
        assert rows[1][0] == " ".join(odd.split())


def test_the_page_of_a_check_has_its_table_and_its_verdict() -> None:
    page = read_page(render_selection(pictures(check=checked([0.8, 0.81, 0.82], [0.7, 0.71, 0.72], [0.9, 0.9, 0.9]))))
    rows = table_named(page, "Check")
    assert rows[0] == ["trained on", "samples", "val loss", "val accuracy", "seconds", "with the selection", "finished"]
    assert rows[1] == ["subset (sage)", "10", "0.810 ± 0.010", "0.810 ± 0.010", "10.0", "15.0", "3/3"]
    assert rows[2][0] == "random, classes alike"
    assert rows[3][1] == "60"
    assert "The subset wins over random subsets" in words_of(page)
    assert "--check" not in words_of(page)


@pytest.mark.parametrize(
    ("subset", "random", "words"),
    [
        ([0.80, 0.81, 0.82], [0.70, 0.71, 0.72], "The subset wins over"),
        ([0.70, 0.71, 0.72], [0.80, 0.81, 0.82], "The subset loses to"),
        ([0.70, 0.80, 0.90], [0.75, 0.76, 0.77], "no better and no worse"),
        ([0.80], [0.70], "With one seed nothing is known"),
        ([math.nan, math.nan], [0.7, 0.8], "No model that was trained on the subset"),
    ],
)
def test_the_verdict_says_who_won_or_that_it_may_be_chance(
    subset: list[float], random: list[float], words: str
) -> None:
    assert words in check_verdict(checked(subset, random, [0.9] * len(subset)))[0]


def test_a_lower_loss_is_the_better_one() -> None:
    low, high = [0.1, 0.11, 0.12], [0.2, 0.21, 0.22]
    assert "wins" in check_verdict(checked(low, high, low, LOSS))[0]
    verdict = check_verdict(checked(high, low, low, LOSS))
    assert "loses" in verdict[0]
    assert "the subset is 0.10 worse" in verdict[1]


def test_the_chance_of_ranges_that_do_not_overlap_is_told() -> None:
    assert "(by chance that happens in 10 %)" in check_verdict(checked([3.0, 4, 5], [0.0, 1, 2], [6.0, 6, 6]))[0]
    # Two seeds against two are apart by chance in one of three cases: nobody has won.
    for low, high, word in (([0.0, 1], [3.0, 4], "behind"), ([3.0, 4], [0.0, 1], "ahead of")):
        verdict = check_verdict(checked(low, high, [6.0, 6]))[0]
        assert f"The subset is {word} random subsets" in verdict
        assert "(by chance that happens in 33 %). Give --check 3 or more to be sure." in verdict


def test_runs_that_diverged_are_counted_and_left_out_of_the_means() -> None:
    grid = check_grid(checked([0.8, math.nan, 0.8], [0.7, 0.7, 0.7], [0.9, 0.9, 0.9]))
    assert grid.rows[0][-1].text == "2/3"
    assert grid.rows[0][2].text == "0.800"


def test_a_page_is_written_whole(tmp_path: object) -> None:
    path = write_selection_page(pictures(), tmp_path / "page.html")  # type: ignore[operator]
    assert path.read_text(encoding="utf-8") == render_selection(pictures())


def test_agreements_just_below_one_are_told_apart() -> None:
    selected = chosen(splits(torch.rand(60, 1, 4, 5)), scores=1 - 1e-5 * torch.arange(1, 61))
    highest = examples(selected)[0]
    assert [picture.score for picture in highest.pictures][:3] == ["1 - 1.0e-5", "1 - 2.0e-5", "1 - 3.0e-5"]
    report = replace(selected.selection.report, numbers={"mean_agreement": 0.9998, "mean_agreement_kept": 0.99992})
    assert [value for name, value, _ in meanings(report) if "agreement" in name] == ["1 - 2.0e-4", "1 - 8.0e-5"]
