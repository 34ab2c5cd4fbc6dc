"""Flags and a TOML file to settings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from steepest.errors import InvalidOptionError
from steepest.training.options import parse_value
from steepest.training.registry import get_optimizer
from steepest.training.settings import Settings, merge, read_settings

__all__ = ["parse_goals", "parse_options", "parse_settings", "settings_from"]

_Kind = TypeVar("_Kind", bound=Settings)


def settings_from(kind: type[_Kind], config: Path | None, flags: Mapping[str, object]) -> _Kind:
    """Settings of a command: its defaults, the file over them, the flags over that.

    Args:
        kind: Which command's settings.
        config: TOML file, if any.
        flags: What was given on the command line; None says nothing.

    Returns:
        The settings.
    """
    return merge(kind, {} if config is None else read_settings(config, kind), flags)


def parse_settings(texts: Sequence[str]) -> dict[str, dict[str, object]]:
    """Read `--set OPTIMIZER.OPTION=VALUE`.

    Args:
        texts: What was given.

    Returns:
        Values by option by optimizer.

    Raises:
        InvalidOptionError: If one is not written like that.
    """
    parsed: dict[str, dict[str, object]] = {}
    for text in texts:
        target, equals, value = text.partition("=")
        optimizer, dot, name = target.strip().partition(".")
        if not (equals and dot and name):
            raise InvalidOptionError(f"--set {text!r}: write OPTIMIZER.OPTION=VALUE, as in sven.lr=0.5")
        parsed.setdefault(optimizer, {})[name] = _value(optimizer, name, value)
    return parsed


def parse_options(texts: Sequence[str], optimizer: str) -> dict[str, object]:
    """Read `--set OPTION=VALUE` for the one optimizer that is trained with; its name may stand before the option.

    Args:
        texts: What was given.
        optimizer: The optimizer.

    Returns:
        Values by option.

    Raises:
        InvalidOptionError: If one is not written like that or names another optimizer.
    """
    parsed = {}
    for text in texts:
        target, equals, value = text.partition("=")
        owner, dot, name = target.strip().rpartition(".")
        if not (equals and name):
            raise InvalidOptionError(f"--set {text!r}: write OPTION=VALUE, as in lr=0.5")
        if dot and owner != optimizer:
            raise InvalidOptionError(f"--set {text!r}: the optimizer of this run is {optimizer}, not {owner}")
        parsed[name] = _value(optimizer, name, value)
    return parsed


def _value(optimizer: str, name: str, text: str) -> object:
    spec = get_optimizer(optimizer).specs().get(name)
    return parse_value(text, spec.annotation if spec else Any)


def parse_goals(texts: Sequence[str]) -> float | dict[str, float] | None:
    """Read `--goal VALUE` or `--goal TASK=VALUE`.

    Args:
        texts: What was given.

    Returns:
        One value for all tasks, a value for each, or None if nothing was given.

    Raises:
        InvalidOptionError: If a value is no number.
    """
    goals = {}
    for text in texts:
        task, _, value = text.rpartition("=")
        try:
            goals[task] = float(value)
        except ValueError as error:
            raise InvalidOptionError(f"--goal {text!r}: write a number, as in 0.1 or digits=0.1") from error
    if "" in goals and len(goals) > 1:
        raise InvalidOptionError("--goal is given for all tasks and for single ones: use one of the two forms")
    return goals.get("", goals or None)
