"""Errors of the training room: bad names, data, settings, records and checkpoints."""

from collections.abc import Iterable
from difflib import get_close_matches

from steepest.errors import CheckpointError, DamagedCheckpointError, InvalidOptionError, OutputError, SteepestError

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DamagedCheckpointError",
    "DataError",
    "OutputError",
    "RecordError",
    "UnknownNameError",
    "unknown",
]


class UnknownNameError(InvalidOptionError):
    """A task, an optimizer or an option that does not exist."""


class DataError(SteepestError):
    """A data file that is missing or cannot be used."""


class ConfigError(SteepestError):
    """A file of settings that cannot be read or says something impossible."""


class RecordError(SteepestError):
    """A run record that cannot be read or written."""


def unknown(what: str, found: str, known: Iterable[str]) -> str:
    """Say that a name does not exist, with the nearest right one.

    Args:
        what: The kind of name, as it reads in a sentence ("task", "option of adam").
        found: What the user wrote.
        known: The names that exist.

    Returns:
        The message of an `UnknownNameError`.

    Example:
        >>> unknown("task", "digit", ["digits", "toy_1d"])
        "unknown task 'digit': did you mean 'digits'? Known: digits, toy_1d"
    """
    names = list(known)
    near = get_close_matches(found, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what} {found!r}: {hint}Known: {', '.join(names)}"
