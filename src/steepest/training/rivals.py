"""What entries of other people's optimizers share: packages that may be missing, several optimizers as one."""

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch.optim import Optimizer

from steepest.errors import SteepestError

__all__ = ["Joined", "MissingPackageError", "keep_lr", "load", "remember_lr"]


class MissingPackageError(SteepestError, ImportError):
    """A package that an optimizer comes from is not installed, or cannot be imported."""


def load(module: str, package: str, what: str, importing: Callable[[str], ModuleType] | None = None) -> ModuleType:
    """Import a package that steepest does without.

    Args:
        module: What to import.
        package: What pip calls it.
        what: What comes from it, for the message.
        importing: How to import it; as Python does by default.

    Returns:
        The module.

    Raises:
        MissingPackageError: If that fails.
    """
    try:
        return (importing or importlib.import_module)(module)
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"{what} comes from the package {package}, and there is no module {error.name} here: install it with "
            f"python -m pip install {package}"
        ) from error
    except (ImportError, RuntimeError, AttributeError, OSError) as error:  # binary packages fail in many ways
        raise MissingPackageError(
            f"{what} comes from the package {package}, which cannot be imported here "
            f"({type(error).__name__}: {error}): mend it, for example with python -m pip install --force-reinstall "
            f"--no-deps {package}"
        ) from error


class Joined(Optimizer):
    """Several optimizers as one: their groups side by side, one state, one schedule, one checkpoint.

    Args:
        parts: The optimizers; no parameter belongs to two of them.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        groups = []
        for number, part in enumerate(parts):
            for group in part.param_groups:
                group["part"] = number
                groups.append(group)
        super().__init__(groups, {})
        self._parts = tuple(parts)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Let every part take its step.

        Args:
            closure: As in torch.optim.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, part in enumerate(self._parts):
            # Anew in every step: loading a state replaces the groups and the state.
            part.param_groups = [group for group in self.param_groups if group["part"] == number]
            part.state = self.state
            part.step()
        return loss


def remember_lr(optimizer: Optimizer) -> None:
    """Note the learning rates for `keep_lr`.

    Args:
        optimizer: A new optimizer.
    """
    for group in optimizer.param_groups:
        group["own_lr"] = group["lr"]


def keep_lr(optimizer: Optimizer, _fraction: float) -> None:
    """Take the schedule of the learning rate back: the optimizer finds the lengths of its steps itself."""
    for group in optimizer.param_groups:
        group["lr"] = group["own_lr"]
