"""Progress of a selection: a bar on a terminal, plain lines elsewhere."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.text import Text

from steepest.report.words import count, memory
from steepest.selection.report import Estimate, Progress, in_seconds

__all__ = ["SelectionDisplay", "estimate_line"]

_WITHOUT_PASS = {"pick": "choosing", "review": "looking at what was kept"}


def estimate_line(estimate: Estimate) -> str:
    """What a selection will cost.

    Args:
        estimate: The estimate.

    Returns:
        One line.
    """
    passes = f"{estimate.passes} pass{'' if estimate.passes == 1 else 'es'}"
    samples = "" if estimate.samples is None else f" over {count(estimate.samples, 'sample')}"
    seconds = "" if estimate.seconds is None else f": about {in_seconds(estimate.seconds)}"
    size = "" if estimate.bytes is None else f", {memory(estimate.bytes)} beside model and batch"
    return f"{passes}{samples}{seconds}{size}"


class SelectionDisplay:
    """Shows where a selection is; its `told` is what `select_subset` takes as `progress`.

    Args:
        console: Where to.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._bar = self._bars.add_task("", total=None, visible=False)
        self._at = ""
        self._estimated = False

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        del kind, value, trace
        self._bars.stop()

    def told(self, progress: Progress) -> None:
        """Show a state.

        Args:
            progress: The state.
        """
        if progress.estimate is not None and not self._estimated:
            self._estimated = True
            self._print(estimate_line(progress.estimate))
        if progress.kind == "estimate":
            return
        what = _WITHOUT_PASS.get(progress.kind) or f"pass {progress.pass_number + 1} of {progress.passes}"
        if what != self._at:
            self._at = what
            self._bars.reset(self._bar, total=progress.batches, description=what, visible=True)
            if not self._console.is_terminal:
                self._print(f"{what} ({in_seconds(progress.seconds)} so far)")
        self._bars.update(self._bar, completed=progress.batch, total=progress.batches)

    def _print(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)
