"""What optimizers tell about their steps."""

from __future__ import annotations

from dataclasses import replace

from made import make_record
from steepest.report.charts import Charts
from steepest.report.groups import group
from steepest.report.inside import inside


def test_the_correction_of_fop_is_told_with_its_length() -> None:
    record = make_record(optimizer="fop")
    history = tuple(replace(point, diagnostics={"r": 0.25} if point.epoch else {}) for point in record.history)
    (cell,) = group([replace(record, history=history), make_record(optimizer="kfac")])
    found = inside(cell, Charts())
    assert found is not None
    assert "FOP 0.25, 1.32 times as long" in " ".join(found.sentences)
    assert found.figures == ()


def test_optimizers_that_tell_nothing_have_no_section() -> None:
    (cell,) = group([make_record(optimizer="sgd")])
    assert inside(cell, Charts()) is None
