"""What a run is to select, in one line of text."""

from __future__ import annotations

import dataclasses

import pytest

from steepest.errors import InvalidOptionError
from steepest.selection.method import Method
from steepest.training.convert import convert
from steepest.training.options import dataclass_specs
from steepest.training.select_text import parse_selection, parse_selections, selection_label
from steepest.training.selections import METHODS, SelectionPlan


def parse(text: str) -> SelectionPlan:
    plan = parse_selection(text)
    assert plan is not None
    return plan


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_has_its_name_its_options_and_defaults_of_the_right_type(name: str) -> None:
    kind = METHODS[name].constructor()
    assert issubclass(kind, Method)
    assert dataclasses.is_dataclass(kind)
    assert METHODS[name].specs().keys() == {item.name for item in dataclasses.fields(kind)}
    for spec in dataclass_specs(kind).values():
        assert convert(spec.default, spec.annotation)[0], spec
    plan = parse(f"{name}:0.25")
    assert (plan.text, plan.warmup, plan.every) == (f"{name}:0.25", 1, 0)
    assert isinstance(plan.method(), kind)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        (" sage : 0.10 ", "sage:0.1"),
        ("SAGE:0.1", "sage:0.1"),
        ("grad-match:0.1", "gradmatch:0.1"),
        ("sage:1e-1:warmup=1:every=0", "sage:0.1"),
        ("sage:0.1:rule=Strata(spread=3.0):weights=uniform", "sage:0.1"),
        ("sage:0.1:every=2:sketch_size=16:warmup=0", "sage:0.1:sketch_size=16:warmup=0:every=2"),
        ("sage:0.1:rule=top", "sage:0.1:rule=Top"),
        ("sage:0.1:rule=random", "sage:0.1:rule=RandomAboveCut"),
        ("sage:0.1:rule=random:tail_cut=0.5:seed=3", "sage:0.1:rule=RandomAboveCut(tail_cut=0.5, seed=3)"),
        ("sage:0.1:tail_cut=0.25", "sage:0.1:rule=Strata(tail_cut=0.25)"),
        ("sage:0.1:scope=all:robust=true", "sage:0.1:scope=all:robust=true"),
        ("sage:0.1:scope=('a', 'b')", "sage:0.1:scope=('a', 'b')"),
        ("el2n:0.123456789", "el2n:0.123456789"),
        ("random:1", "random:1"),
    ],
)
def test_there_is_one_way_to_write_it_and_it_reads_back(text: str, canonical: str) -> None:
    plan = parse(text)
    assert plan.text == canonical
    assert parse(canonical) == plan


def test_options_reach_the_method() -> None:
    method = parse("sage:0.1:sketch_size=16:rule=random:tail_cut=0.5").method()
    assert (method.sketch_size, method.rule.tail_cut) == (16, 0.5)  # type: ignore[attr-defined]


def test_none_is_everything() -> None:
    assert parse_selection("none") is None
    plans = parse_selections([None, "sage:0.1", "random:0.1"])
    assert [plan and plan.text for plan in plans] == [None, "sage:0.1", "random:0.1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown selection method '': Known: none, sage"),
        ("sag:0.1", "unknown selection method 'sag': did you mean 'sage'?"),
        ("sage", "write METHOD:FRACTION, as in sage:0.1, or none"),
        ("none:0.1", "none trains on everything and takes nothing"),
        ("sage:", "the fraction is '', give a number above 0"),
        ("sage:much", "the fraction is 'much'"),
        ("sage:0", "the fraction is '0'"),
        ("sage:1.01", "at most 1"),
        ("sage:nan", "the fraction is 'nan'"),
        ("sage:0.1:top", "'top' is no option, write NAME=VALUE"),
        ("sage:0.1:", "'' is no option"),
        ("sage:0.1:rule=", "'rule=' is no option"),
        ("sage:0.1:rull=top", "unknown option of sage 'rull': did you mean 'rule'?"),
        ("sage:0.1:tail_cutt=0.1", "did you mean 'tail_cut'?"),
        ("sage:0.1:rule=top:tail_cut=0.1", "unknown option of sage 'tail_cut'"),
        ("sage:0.1:rule=bottom", "option sage.rule got 'bottom': it takes Top(...) or Strata(...)"),
        ("sage:0.1:tail_cut=2", "sage.rule: tail_cut=2.0"),
        ("sage:0.1:tail_cut=much", "option rule.tail_cut got 'much': it takes float"),
        ("sage:0.1:sketch_size=0", "sketch_size=0: give an integer of at least 1"),
        ("sage:0.1:sketch_size=8:sketch_size=9", "sketch_size is given twice"),
        ("sage:0.1:warmup=-1", "warmup is -1, give a whole number of epochs from 0 on"),
        ("sage:0.1:every=0.5", "option sage.every got 0.5: it takes int"),
        ("sage:0.1:consensus=reference", "compares with data of its own"),
    ],
)
def test_a_wrong_selection_is_told_in_one_line(text: str, message: str) -> None:
    with pytest.raises(InvalidOptionError) as caught:
        parse_selection(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_selection_is_named_once_however_it_is_written() -> None:
    with pytest.raises(InvalidOptionError, match=r"the selection sage:0\.1 is named twice"):
        parse_selections(["none", "sage:0.1", "sage:0.10:warmup=1"])
    with pytest.raises(InvalidOptionError, match="the selection none is named twice"):
        parse_selections(["none", None])


@pytest.mark.parametrize(
    ("text", "epochs"),
    [
        ("random:0.1", [2]),
        ("random:0.1:warmup=0", [1]),
        ("random:0.1:every=1", [2, 3, 4, 5, 6, 7]),
        ("random:0.1:warmup=2:every=3", [3, 6]),
        ("random:0.1:warmup=0:every=2", [1, 3, 5, 7]),
    ],
)
def test_when_a_run_selects(text: str, epochs: list[int]) -> None:
    assert [epoch for epoch in range(1, 8) if parse(text).due(epoch)] == epochs


@pytest.mark.parametrize(
    ("fraction", "samples", "kept"), [("0.1", 1079, 108), ("0.1", 1, 1), ("0.001", 100, 1), ("1", 7, 7), ("0.5", 5, 3)]
)
def test_how_many_are_kept(fraction: str, samples: int, kept: int) -> None:
    assert parse(f"random:{fraction}").kept(samples) == kept


def test_what_is_drawn_depends_on_run_epoch_and_seed_and_on_nothing_else() -> None:
    plan = parse("random:0.1")
    places = [(0, 1), (0, 2), (1, 1), (1, 2)]
    seeds = {plan.method(seed=seed, epoch=epoch).seed for seed, epoch in places}  # type: ignore[attr-defined]
    seeds |= {parse("random:0.1:seed=5").method(seed=0, epoch=1).seed}  # type: ignore[attr-defined]
    assert len(seeds) == 5
    assert plan.method(seed=1, epoch=2) == plan.method(seed=1, epoch=2)
    inner = parse("sage:0.1:rule=random")
    rules = {inner.method(seed=seed).rule.seed for seed in range(4)}  # type: ignore[attr-defined]
    assert len(rules) == 4


def test_labels_are_for_people() -> None:
    assert selection_label("sage:0.1") == "sage 0.1"
    assert selection_label(parse("sage:0.1:rule=top:every=2").text) == "sage 0.1 (rule=Top, every=2)"
    assert selection_label("unheard_of") == "unheard_of"
