"""Colours: contrast is computed, and a row keeps its colour."""

from __future__ import annotations

import pytest

from made import make_record
from steepest.report.groups import group
from steepest.report.palette import DARK, LIGHT, OTHERS, Paper, colour_of, contrast, looks, readable
from steepest.report.style import PagePaint
from steepest.training.registry import optimizers

COLOURS = [*OTHERS, *(entry.colour for entry in optimizers().values()), "#444444", "#ffffff", "#000000"]


@pytest.mark.parametrize("paper", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("colour", COLOURS)
def test_lines_and_words_in_every_colour_can_be_read(paper: Paper, colour: str) -> None:
    assert contrast(readable(colour, paper.paper, paper.line), paper.paper) >= 3
    assert contrast(readable(colour, paper.paper, paper.text), paper.paper) >= 4.5


@pytest.mark.parametrize("paper", [LIGHT, DARK], ids=["light", "dark"])
def test_text_can_be_read(paper: Paper) -> None:
    for background in (paper.paper, paper.raised):
        assert contrast(paper.ink, background) >= 7
        assert contrast(paper.muted, background) >= 4.5
    assert contrast(paper.accent, paper.paper) >= 4.5


def test_the_values_on_the_page_are_the_readable_ones() -> None:
    paint = PagePaint()
    (cell,) = group([make_record(optimizer=name) for name in ("sven", "sgd", "adam", "lbfgs", "unheard_of")])
    for look in looks(cell.rows):
        paint.line(look)
    for paper in (LIGHT, DARK):
        values = paint.values(paper)
        assert len(values) == 10
        for name, value in values.items():
            assert contrast(value, paper.paper) >= (4.5 if name.endswith("-text") else 3)


def test_contrast_is_that_of_the_guidelines() -> None:
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


def test_an_unknown_optimizer_has_a_colour_that_depends_on_its_name_alone() -> None:
    assert colour_of("unheard_of") == colour_of("unheard_of")
    assert colour_of("unheard_of") in OTHERS
    assert len({colour_of(f"optimizer {number}") for number in range(40)}) > 5


def test_rows_of_one_optimizer_differ_in_colour_and_dashes() -> None:
    (cell,) = group([make_record(optimizer="sven", options={"lr": rate}) for rate in (0.1, 0.2, 0.3)])
    found = looks(cell.rows)
    assert found[0].colour == colour_of("sven")
    assert len({look.colour for look in found}) == len({look.dashes for look in found}) == 3
