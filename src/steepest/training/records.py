"""Run records: one JSON line per run, one file per run, written atomically.

A record is written to a temporary file beside its place, flushed to disk and renamed: after `kill -9` at
any moment a record is either complete or absent. One file per run also lets a damaged record be named, and
`cat records/*.jsonl` is the whole comparison as JSON lines.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from steepest.training.convert import convert
from steepest.training.errors import RecordError
from steepest.training.files import prepare_folder, write_atomically
from steepest.training.spec import RunSpec

__all__ = [
    "SCHEMA",
    "EpochPoint",
    "Final",
    "MetricNote",
    "Problem",
    "RecordStore",
    "RunRecord",
    "Selected",
    "Status",
    "finite",
]

SCHEMA = 3
Status = Literal["finished", "diverged", "failed", "timed_out"]


@dataclass(frozen=True)
class MetricNote:
    """What a report needs to know of a metric."""

    name: str
    label: str
    higher_is_better: bool


@dataclass(frozen=True)
class Problem:
    """What was trained on, in words: a report then needs nothing but records.

    Attributes:
        description: One line about data and model.
        kind: Classification or regression.
        loss: Name of the loss.
        metrics: The metrics, the main one first.
        model: The model that was named instead of the task's own, if any.
        notes: What was inferred about the data.
        digest: Hash of the files and the user's code behind it, empty for built-in data.
    """

    description: str
    kind: str
    loss: str
    metrics: tuple[MetricNote, ...]
    model: str | None = None
    notes: tuple[str, ...] = ()
    digest: str = ""


@dataclass(frozen=True)
class EpochPoint:
    """State at the end of an epoch; epoch 0 is the untrained model. None stands for a non-finite number.

    `diagnostics` are numbers about the optimizer's last step, `series` are rows of numbers (a spectrum).
    """

    epoch: int
    steps: int
    seconds: float
    train_loss: float | None
    val_loss: float | None
    val_metrics: dict[str, float | None]
    diagnostics: dict[str, float | None] = field(default_factory=dict)
    series: dict[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Selected:
    """What a run selected at one time.

    Attributes:
        epoch: The first epoch that was trained on it.
        kept: Samples that were kept.
        seconds: What selecting took; it is part of the run's training time.
        wrong: Samples whose label is known to be wrong: those that were kept and all of them; None where it is not
            known.
        digest: Hash of what was kept, and of the weights.
        notes: What the method has to say.
        numbers: What it measured by the way.
    """

    epoch: int
    kept: int
    seconds: float
    wrong: tuple[int, int] | None
    digest: str
    notes: tuple[str, ...]
    numbers: dict[str, float | None]


@dataclass(frozen=True)
class Final:
    """Numbers of the last model; nothing is selected by looking at the test split."""

    val_loss: float | None
    test_loss: float | None
    val_metrics: dict[str, float | None]
    test_metrics: dict[str, float | None]


@dataclass(frozen=True)
class RunRecord:
    """Everything that is kept of one run.

    Attributes:
        schema: Version of this layout.
        key: `RunSpec.key()` of the run.
        task: Name of the task.
        problem: What the task is.
        optimizer: Name of the optimizer.
        options: Options given to the constructor, as JSON.
        options_source: How they were chosen.
        seed: Seed of initialisation and data order.
        data_seed: Seed of the splits.
        epochs: Budget of epochs, if any.
        budget_seconds: Budget of seconds, if any.
        schedule: Learning-rate schedule.
        batch_size: Samples per step.
        status: finished, diverged (non-finite, or final validation loss above ten times the untrained one),
            failed (an error) or timed_out.
        error: What went wrong, if something did.
        started: UTC time in ISO format.
        environment: Versions, machine, threads, precision, commit.
        history: Epoch by epoch; the first entry is the untrained model.
        final: Numbers of the last model, absent if the run did not get there.
        seconds: Training time, selections included; evaluation, data loading and the libraries' warm-up are not
            counted.
        steps: Optimizer steps taken.
        peak_memory: Growth of memory during the run in bytes, None where it cannot be told.
        memory_kind: What `peak_memory` measures.
        num_parameters: Trainable numbers in the model.
        samples: Samples in the training, validation and test split.
        fingerprint: Hash of the initial parameters and the first epoch's order: equal for all optimizers
            that are compared at one seed.
        select: What was selected to train on; None where a run trained on everything.
        selections: What was selected, in the order of time.
    """

    schema: int
    key: str
    task: str
    problem: Problem
    optimizer: str
    options: dict[str, object]
    options_source: str
    seed: int
    data_seed: int
    epochs: int | None
    budget_seconds: float | None
    schedule: str
    batch_size: int
    status: Status
    error: str | None
    started: str
    environment: dict[str, str | int | None]
    history: tuple[EpochPoint, ...]
    final: Final | None
    seconds: float
    steps: int
    peak_memory: int | None
    memory_kind: str
    num_parameters: int | None
    samples: tuple[int, int, int] | None
    fingerprint: str | None
    select: str | None
    selections: tuple[Selected, ...]

    def to_line(self) -> str:
        """The record as one line of JSON.

        Returns:
            The line with its newline.
        """
        return json.dumps(asdict(self), allow_nan=False, default=_refuse) + "\n"

    @classmethod
    def from_line(cls, line: str, origin: str) -> "RunRecord":
        """Read a record back, checking every field.

        Args:
            line: One line of JSON.
            origin: Where it comes from, for the messages.

        Returns:
            The record.

        Raises:
            RecordError: If it is no record of this schema.
        """
        remedy = "delete that file to have the run repeated"
        try:
            data = json.loads(line)
        except ValueError as error:
            raise RecordError(f"{origin} is no run record: {error}; {remedy}") from error
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise RecordError(
                f"{origin} has record schema {found!r}, this steepest reads {SCHEMA}; {remedy} "
                "or read it with the version that wrote it"
            )
        fits, record = convert(data, cls)
        if not fits:
            raise RecordError(f"{origin} is no complete run record: a field is missing or wrong; {remedy}")
        return record  # type: ignore[no-any-return]


def _refuse(value: object) -> object:
    raise TypeError(f"{type(value).__name__} has no place in a record")


def finite(value: float) -> float | None:
    """JSON has no NaN and no infinity: None stands for them.

    Args:
        value: Any float.

    Returns:
        The value, or None.
    """
    return value if math.isfinite(value) else None


class RecordStore:
    """The records of one comparison in a folder of their own.

    Args:
        folder: Where they are; it is made by `prepare` or with the first record.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def prepare(self) -> None:
        """Make the folder, see that it can be written to, and remove temporary files of killed runs."""
        prepare_folder(self.folder)

    def path(self, spec: RunSpec) -> Path:
        """File of a run's record.

        Args:
            spec: The run.

        Returns:
            The path, whether it exists or not.
        """
        return self.folder / f"{spec.task}.{spec.optimizer}.seed{spec.seed}.{spec.key()}.jsonl"

    def read(self, spec: RunSpec) -> RunRecord | None:
        """Read the record of a run.

        Args:
            spec: The run.

        Returns:
            The record, or None if there is none.
        """
        path = self.path(spec)
        return _read_file(path) if path.exists() else None

    def write(self, spec: RunSpec, record: RunRecord) -> Path:
        """Write the record of a run, atomically.

        Args:
            spec: The run.
            record: Its record.

        Returns:
            Where it is.
        """
        path = self.path(spec)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, record.to_line())
        return path

    def read_all(self) -> list[RunRecord]:
        """Read every record of the folder, in the order of the file names.

        Returns:
            The records.
        """
        return list(_read_files(sorted(self.folder.glob("*.jsonl"))))


def _read_files(paths: Iterable[Path]) -> Iterable[RunRecord]:
    return (_read_file(path) for path in paths)


def _read_file(path: Path) -> RunRecord:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path} cannot be read: {error}; delete it to have the run repeated") from error
    return RunRecord.from_line(text, str(path))
