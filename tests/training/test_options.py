"""Options read from signatures, text turned into values, types checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest
import torch

import steepest as st
from steepest.errors import InvalidOptionError
from steepest.training.convert import convert, describe, plain
from steepest.training.options import check_options, option_specs, parse_value
from steepest.training.registry import get_optimizer, optimizers


@dataclass(frozen=True)
class Knob:
    size: int = 1
    share: float = 0.5

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError("size below 0")


class Optimizer:
    def __init__(
        self,
        params: object,
        lr: float = 0.1,
        *,
        count: int = 3,
        mode: Literal["a", "b"] = "a",
        betas: tuple[float, float] = (0.9, 0.99),
        knob: Knob | None = None,
        fast: bool = False,
    ) -> None:
        del params, lr, count, mode, betas, knob, fast


SPECS = option_specs(Optimizer)


def test_the_signature_is_the_list() -> None:
    assert list(SPECS) == ["lr", "count", "mode", "betas", "knob", "fast"]
    assert SPECS["lr"].default == 0.1
    assert list(option_specs(torch.optim.SGD))[:2] == ["lr", "momentum"]
    assert "params" not in option_specs(st.Sven)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("lr", "0.5", 0.5),
        ("lr", "1", 1.0),
        ("lr", "1e-3", 1e-3),
        ("count", "7", 7),
        ("mode", "b", "b"),
        ("mode", "'b'", "b"),
        ("betas", "(0.8, 0.9)", (0.8, 0.9)),
        ("betas", "[0.8, 1]", (0.8, 1.0)),
        ("fast", "true", True),
        ("fast", "False", False),
        ("knob", "none", None),
        ("knob", "Knob(size=3)", Knob(3)),
        ("knob", "Knob()", Knob()),
    ],
)
def test_text_becomes_a_value_of_the_right_type(name: str, text: str, value: object) -> None:
    found = check_options("opt", SPECS, {name: parse_value(text, SPECS[name].annotation)})[name]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("lrr", "1", "unknown option of opt 'lrr': did you mean 'lr'"),
        ("lr", "big", "opt.lr got 'big': it takes float"),
        ("lr", "true", "opt.lr got True: it takes float"),
        ("lr", "none", "opt.lr got None"),
        ("count", "1.5", "opt.count got 1.5: it takes int"),
        ("count", "__import__('os')", "it takes int"),
        ("mode", "c", "it takes 'a' or 'b'"),
        ("betas", "(1,)", "it takes (float, float)"),
        ("fast", "1", "it takes bool"),
        ("knob", "Knobb(size=1)", "did you mean 'Knob'"),
        ("knob", "Knob(sise=1)", "unknown option of Knob 'sise': did you mean 'size'"),
        ("knob", "Knob(size='x')", "Knob.size got 'x': it takes int"),
        ("knob", "Knob(3)", "write the values by name"),
        ("knob", "Knob(size=-1)", "size below 0"),
        ("knob", "5", r"it takes Knob(...) or none"),
        ("knob", "open('x')", "unknown value 'open'"),
    ],
)
def test_a_wrong_option_is_told_in_one_line(name: str, text: str, message: str) -> None:
    annotation = SPECS[name].annotation if name in SPECS else object
    with pytest.raises(InvalidOptionError) as caught:
        check_options("opt", SPECS, {name: parse_value(text, annotation)})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_solvers_of_sven_are_found_through_their_protocol() -> None:
    specs = get_optimizer("sven").specs()
    solver = parse_value("TruncatedEigh(rank=32, rtol=1e-4)", specs["solver"].annotation)
    assert solver == st.TruncatedEigh(rank=32, rtol=1e-4)
    assert convert(plain(solver), specs["solver"].annotation) == (True, solver)
    assert "Damped(...)" in describe(specs["solver"].annotation)


@pytest.mark.parametrize("name", sorted(optimizers()))
def test_every_default_has_the_type_that_its_annotation_says(name: str) -> None:
    for spec in get_optimizer(name).specs().values():
        assert convert(spec.default, spec.annotation)[0], spec


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        ({"type": "Dampd", "damping": 0.1}, "unknown value 'Dampd': did you mean 'Damped'"),
        ({"type": "Damped", "damp": 0.1}, "unknown option of Damped 'damp': did you mean 'damping'"),
        ({"type": "Damped", "damping": "much"}, "option Damped.damping got 'much': it takes float"),
        ({"type": "Damped", "damping": -1.0}, "Damped: "),
        ({"damp": 0.1}, "option sven.solver got {'damp': 0.1}: it takes"),
    ],
)
def test_a_wrong_table_in_a_file_is_told_with_the_nearest_name(solver: object, message: str) -> None:
    specs = get_optimizer("sven").specs()
    with pytest.raises(InvalidOptionError) as caught:
        check_options("sven", specs, {"solver": solver})
    assert message in str(caught.value)
