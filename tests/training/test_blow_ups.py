"""When a finite validation loss counts as lost."""

from __future__ import annotations

import pytest

from made import make_history
from steepest.training.blow_ups import blow_up


@pytest.mark.parametrize(
    ("losses", "epoch"),
    [
        ([1.0, 0.1, 2.0, 3.0], 2),
        ([1.0, 20.0, 30.0, 0.5], 1),  # recovered, but it was lost
        ([1.0, 0.1, 2.0, 0.2, 2.0, 0.2], None),  # a bad batch each
        ([1.0, 0.01, 0.2, 0.9, 0.9], None),  # overfitted, and still better than before training
        ([1.0, 0.5, 4.0, 4.5], None),  # worse than before training, not lost
        ([1.0, 0.1, 2.0, None, 3.0], None),
        ([1.0, 0.1, None, 2.0, 3.0], 3),
        ([0.0, 1e-9, 1e-8], 1),
        ([1.0], None),
        ([None, 1.0, 100.0, 100.0], None),
        ([], None),
    ],
)
def test_it_takes_ten_times_the_best_and_more_than_before_training_twice_in_a_row(
    losses: list[float | None], epoch: int | None
) -> None:
    found = blow_up(make_history(losses))
    assert (None if found is None else found.epoch) == epoch
