"""Selections within a run: kept while they are under way, until the run's own checkpoint has what was selected."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from steepest.distributed.checkpoint.folders import forget
from steepest.distributed.checkpoint.together import lead
from steepest.training.checkpoints.keeping import Keeping
from steepest.training.loop import Trainer
from steepest.training.select_text import parse_selection

if TYPE_CHECKING:
    from steepest.selection.keeping import Keep

__all__ = ["Selections"]

_WORTH = 1.0  # seconds: a selection that took less is made again sooner than kept


class Selections:
    """The selections of one run, and the folder in which they are kept.

    Args:
        trainer: The run.
        keeping: Where its checkpoints are.
        save: Writes one of the run.
    """

    def __init__(self, trainer: Trainer, keeping: Keeping, save: Callable[[], None]) -> None:
        self._trainer, self._keeping, self._save = trainer, keeping, save
        self._plan = None if trainer.spec.select is None else parse_selection(trainer.spec.select)
        self._folder = keeping.checkpoints / "selection"
        self._saved: tuple[int, int, int] | None = None
        self._earlier = 0.0

    def keep(self) -> "Keep":
        """Say where and how a selection is kept.

        Before its first checkpoint the run itself is written: the selection goes on with this very model.

        Returns:
            Where and how.
        """
        from steepest.selection.keeping import Keep

        return Keep(
            self._folder,
            self._keeping.every,
            say=self._keeping.say,
            resumed=self._resumed,
            before=self._before,
            stop=None if self._trainer.ranks is None else self._keeping.stop,
            replaceable=True,
            worth=_WORTH,
            stays=True,
        )

    def saved(self) -> None:
        """Note that the run was written, or read; what was selected before needs no checkpoint of its own then."""
        self._saved = self._place()
        if self._plan is not None and not self._is_due():
            lead(self._trainer.ranks, lambda: forget(self._folder))

    def settle(self) -> None:
        """Put on the run's clock what a selection had taken before it was interrupted, once it is done."""
        progress = self._trainer.progress
        if self._earlier and progress.selections and not self._is_due():
            last = progress.selections[-1]
            progress.selections[-1] = replace(last, seconds=last.seconds + self._earlier)
            progress.seconds += self._earlier
            self._earlier = 0.0

    def _resumed(self, seconds: float) -> None:
        self._earlier = seconds

    def _before(self) -> None:
        if self._saved != self._place():
            self._save()

    def _place(self) -> tuple[int, int, int]:
        """What tells two states of the run apart."""
        progress = self._trainer.progress
        return progress.epoch, progress.steps, len(progress.selections)

    def _is_due(self) -> bool:
        """Whether the run selects before its next step."""
        progress, plan = self._trainer.progress, self._plan
        done = progress.selections
        return plan is not None and plan.due(progress.epoch) and not (done and done[-1].epoch == progress.epoch)
