"""Progress of a comparison: a live display on a terminal, plain lines elsewhere."""

from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from steepest.report.groups import label_of
from steepest.report.words import count, score, short
from steepest.training.blow_ups import REMEDY, blow_up
from steepest.training.records import EpochPoint, RunRecord
from steepest.training.spec import RunSpec

__all__ = ["LiveListener", "PlainListener", "epoch_line", "listener_for", "run_line"]

_SHOWN_RUNS = 8


def run_line(spec: RunSpec, record: RunRecord, *, resumed: bool) -> str:
    """One line about a run that is done.

    Args:
        spec: The run.
        record: Its record.
        resumed: Whether it was there before.

    Returns:
        The line.
    """
    parts = [f"{spec.task:<13} {label_of(spec.optimizer, spec.select):<7} seed {spec.seed:<4}"]
    if record.final is not None and record.final.val_loss is not None:
        parts.append(f"val loss {record.final.val_loss:<9.3g}")
    parts.append(f"{record.seconds:7.2f} s")
    rate = record.options.get("lr")
    if isinstance(rate, int | float):
        parts.append(f"lr {rate:<7g}")
    parts.append("already recorded" if resumed else record.status.replace("_", " "))
    lost = blow_up(record.history)
    if lost is not None:
        parts.append(f"(the validation loss blew up at epoch {lost.epoch})")
    if record.error is not None and not resumed:
        parts.append(f"({' '.join(record.error.split())[:160]})")
    return "  ".join(parts)


def epoch_line(spec: RunSpec, point: EpochPoint) -> str:
    """One line about an epoch that is done.

    Args:
        spec: The run.
        point: Its new point.

    Returns:
        The line.
    """
    total = "" if spec.epochs is None else f"/{spec.epochs}"
    parts = [f"epoch {point.epoch:>{max(len(total) - 1, 3)}}{total}"]
    if point.train_loss is not None:
        parts.append(f"train loss {point.train_loss:<9.3g}")
    parts.append("val loss " + ("not finite" if point.val_loss is None else f"{point.val_loss:<9.3g}"))
    parts += [f"{name} {_metric(value)}" for name, value in point.val_metrics.items() if value is not None]
    return "  ".join([*parts, f"{point.seconds:.2f} s"])


def _metric(value: float) -> str:
    return score(value, lambda plain: short(float(f"{plain:.4g}")))


class _Watch:
    """Notices when the validation loss of the current run blows up, once."""

    def __init__(self) -> None:
        self._points: list[EpochPoint] = []
        self._told = False

    def look(self, point: EpochPoint) -> str | None:
        """A warning, or None."""
        self._points = [*(self._points if point.epoch else []), point]
        self._told = self._told and bool(point.epoch)
        found = None if self._told else blow_up(self._points)
        if found is None:
            return None
        self._told = True
        losses = [each.val_loss for each in self._points if each.val_loss is not None]
        return (
            f"warning: the validation loss has blown up: {point.val_loss:.3g} after epoch {point.epoch}, "
            f"{losses[0]:.3g} before training and {min(losses):.3g} at its best; {REMEDY}"
        )


class PlainListener:
    """One line per run, for files and pipes.

    Args:
        console: Where to.
        every_epoch: Whether every epoch has a line too, as suits a single run.
    """

    def __init__(self, console: Console, *, every_epoch: bool = False) -> None:
        self._console = console
        self._every_epoch = every_epoch
        self._watch = _Watch()
        self._place = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        del kind, value, trace

    def begin(self, title: str, total: int) -> None:
        """Announce a series of runs.

        Args:
            title: What they are.
            total: How many.
        """
        self._print(f"{title}: {count(total, 'run')}")

    def run_started(self, spec: RunSpec, number: int, total: int) -> None:
        """Remember the place of the run.

        Args:
            spec: The run.
            number: Its number, from 1.
            total: How many there are.
        """
        del spec
        self._place = f"[{number:>{len(str(total))}}/{total}] "

    def epoch_done(self, spec: RunSpec, point: EpochPoint) -> None:
        """Print the epoch's line if every epoch has one.

        Args:
            spec: The run.
            point: Its new point.
        """
        if self._every_epoch:
            self._print(epoch_line(spec, point))
        warning = self._watch.look(point)
        if warning is not None:
            self._print(warning if self._every_epoch else f"{self._place}{warning}")

    def run_done(self, spec: RunSpec, record: RunRecord, *, resumed: bool) -> None:
        """Print the run's line.

        Args:
            spec: The run.
            record: Its record.
            resumed: Whether it was there before.
        """
        self._print(("" if resumed else self._place) + run_line(spec, record, resumed=resumed))

    def _print(self, line: str) -> None:
        # Text, not str: brackets in a user's names are no markup. Long lines stay whole.
        self._console.print(Text(line), soft_wrap=True)


class LiveListener:
    """Bars for all runs and for the current one, and the latest results, redrawn in place.

    Args:
        console: A terminal.
    """

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
        )
        self._all = self._progress.add_task("runs", total=None, note="")
        self._run = self._progress.add_task("", total=None, note="", visible=False)
        self._lines: list[Text] = []
        self._watch = _Watch()
        self._live = Live(self._group(), console=console, refresh_per_second=8, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        del kind, value, trace
        self._live.stop()

    def begin(self, title: str, total: int) -> None:
        """Start the bar of a series of runs.

        Args:
            title: What they are.
            total: How many.
        """
        self._progress.reset(self._all, total=total, description=title, note="")

    def run_started(self, spec: RunSpec, number: int, total: int) -> None:
        """Start the bar of a run.

        Args:
            spec: The run.
            number: Its number, from 1.
            total: How many there are.
        """
        del number, total
        label = f"{spec.task} {label_of(spec.optimizer, spec.select)} seed {spec.seed}"
        self._progress.reset(self._run, total=spec.epochs, description=label, visible=True, note="")

    def epoch_done(self, spec: RunSpec, point: EpochPoint) -> None:
        """Move the bar of the run.

        Args:
            spec: The run.
            point: Its new point.
        """
        del spec
        loss = "not finite" if point.val_loss is None else f"{point.val_loss:.3g}"
        note = f"val loss {loss}  {point.seconds:.1f} s"
        self._progress.update(self._run, completed=point.epoch, note=note)
        warning = self._watch.look(point)
        if warning is not None:
            self._lines.append(Text(warning, style="yellow", overflow="ellipsis"))
            self._live.update(self._group())

    def run_done(self, spec: RunSpec, record: RunRecord, *, resumed: bool) -> None:
        """Add the run's line.

        Args:
            spec: The run.
            record: Its record.
            resumed: Whether it was there before.
        """
        style = {"finished": "", "diverged": "yellow"}.get(record.status, "red")
        self._lines.append(Text(run_line(spec, record, resumed=resumed), style=style, overflow="ellipsis"))
        self._progress.advance(self._all)
        self._progress.update(self._run, visible=False)
        self._live.update(self._group())

    def _group(self) -> Group:
        return Group(*self._lines[-_SHOWN_RUNS:], self._progress)


def listener_for(console: Console, *, every_epoch: bool = False) -> LiveListener | PlainListener:
    """The display that suits an output.

    Args:
        console: Where to.
        every_epoch: Whether plain lines tell of every epoch; a live display always does.

    Returns:
        A live display for a terminal, plain lines for anything else.
    """
    return LiveListener(console) if console.is_terminal else PlainListener(console, every_epoch=every_epoch)
