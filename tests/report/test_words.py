"""Numbers and options as text."""

from __future__ import annotations

import pytest

from steepest.report.words import count, memory, number, option_text, options_text, times


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "0"),
        (0.05, "0.0500"),
        (99.96, "100"),
        (1234.5, "1234"),
        (1e7, "1.00e7"),
        (-2.5e-7, "-2.50e-7"),
    ],
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_options_read_like_a_command() -> None:
    options = {
        "lr": 1e-3,
        "nesterov": True,
        "betas": [0.9, 0.999],
        "rank": None,
        "solver": {"type": "Damped", "damping": 0.1},
    }
    assert options_text(options) == "lr=0.001, nesterov=true, betas=(0.9, 0.999), rank=none, solver=Damped(damping=0.1)"
    assert options_text({}) == "all defaults"
    assert option_text("<b>") == "<b>"


def test_counts_sizes_and_ratios() -> None:
    assert [count(1, "run"), count(1200, "run")] == ["1 run", "1,200 runs"]
    assert [memory(1536), memory(3 * 2**20), memory(2.5 * 2**30)] == ["2 KiB", "3.0 MiB", "2.5 GiB"]
    assert [times(1.04), times(12.4), times(3e8)] == ["1.0", "12", "3.0e8"]
