"""Run records: one JSON line per run, one file per run, written atomically.

A record is written to a temporary file beside its place, flushed to disk and renamed: after `kill -9` at
any moment a record is either complete or absent. One file per run also lets a damaged record be named, and
`cat records/*.jsonl` is the whole comparison as JSON lines.
"""

import json
import math
import os
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from steepest.training.convert import convert
from steepest.training.errors import RecordError
from steepest.training.spec import RunSpec

__all__ = ["SCHEMA", "EpochPoint", "Final", "RecordStore", "RunRecord", "Status", "finite", "write_atomically"]

SCHEMA = 1
Status = Literal["finished", "diverged", "failed", "timed_out"]


@dataclass(frozen=True)
class EpochPoint:
    """State at the end of an epoch; epoch 0 is the untrained model. None stands for a non-finite number."""

    epoch: int
    steps: int
    seconds: float
    train_loss: float | None
    val_loss: float | None
    val_metrics: dict[str, float | None]
    diagnostics: dict[str, float | None] = field(default_factory=dict)


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
        optimizer: Name of the optimizer.
        options: Options given to the constructor, as JSON.
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
        seconds: Training time; evaluation, data loading and warm-up are not counted.
        steps: Optimizer steps taken.
        peak_memory: Growth of memory during the run in bytes, None where it cannot be told.
        memory_kind: What `peak_memory` measures.
        num_parameters: Trainable numbers in the model.
        fingerprint: Hash of the initial parameters and the first epoch's order: equal for all optimizers
            that are compared at one seed.
    """

    schema: int
    key: str
    task: str
    optimizer: str
    options: dict[str, object]
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
    fingerprint: str | None

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


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that it is either complete or absent, whatever happens.

    Args:
        path: Where to.
        content: Text (written as UTF-8) or bytes.
    """
    data = content.encode() if isinstance(content, str) else content
    # Not tempfile: its files are for their owner only, and a rename would keep that.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class RecordStore:
    """The records of one comparison in a folder of their own.

    Args:
        folder: Made when missing. Temporary files of killed runs in it are removed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*.jsonl.*.tmp"):
            leftover.unlink(missing_ok=True)

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
