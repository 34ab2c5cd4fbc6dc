"""What the tests of optimizers share."""

from __future__ import annotations

import pytest

from steepest.optim import choices


@pytest.fixture
def no_model_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without options Sven solves as it does for large models: by leave-one-out, in the metric."""
    monkeypatch.setattr(choices, "_SMALL", 0)
