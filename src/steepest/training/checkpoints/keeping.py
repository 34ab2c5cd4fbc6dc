"""What a run keeps on disk beside its record."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Keeping"]


@dataclass(frozen=True)
class Keeping:
    """What a run keeps on disk beside its record.

    Attributes:
        checkpoints: Folder of the checkpoints.
        model: File of the trained model.
        settings: What the user asked for, as JSON, to be found again on resuming.
        every: Seconds of wall-clock time between two checkpoints.
        keep: How many checkpoints stay, the newest ones.
        stop: Whether the run should stop before its next step; it then writes a checkpoint and raises
            KeyboardInterrupt.
        say: Told where a damaged checkpoint was passed over for the one before it.
    """

    checkpoints: Path
    model: Path
    settings: str = "{}"
    every: float = 30.0
    keep: int = 2
    stop: Callable[[], bool] = field(default=lambda: False)
    say: Callable[[str], None] = field(default=lambda _: None)
