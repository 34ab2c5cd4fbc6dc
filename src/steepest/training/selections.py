"""The registry of selection methods, and what a run selects when.

There is no second list of options: names, types and defaults are the fields of each method's dataclass.
"""

import dataclasses
import hashlib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from steepest.errors import InvalidOptionError, SteepestError
from steepest.training.options import OptionSpec, dataclass_specs

if TYPE_CHECKING:
    from steepest.selection.method import Method

__all__ = ["METHODS", "TIMES", "SelectionEntry", "SelectionPlan"]

# When a run selects: options of every method.
TIMES: Mapping[str, OptionSpec] = {
    "warmup": OptionSpec("warmup", int, 1),
    "every": OptionSpec("every", int, 0),
}


@dataclass(frozen=True)
class SelectionEntry:
    """One entry of the registry of selection methods.

    Attributes:
        name: Name on the command line and in tables.
        description: One line for people.
        module: Where its class is; imported late.
        attribute: Name of the class, a frozen dataclass.
    """

    name: str
    description: str
    module: str
    attribute: str

    def constructor(self) -> "type[Method]":
        """Import the class.

        Returns:
            The class.
        """
        return cast("type[Method]", getattr(importlib.import_module(self.module), self.attribute))

    def specs(self) -> dict[str, OptionSpec]:
        """Options of the method: the fields of the class.

        Returns:
            Specification by option name.
        """
        return dataclass_specs(self.constructor())

    def make(self, options: Mapping[str, object], where: str) -> "Method":
        """Make the method, whose class knows its impossible values best.

        Args:
            options: Checked options.
            where: What they stand in, for the message.

        Returns:
            The method.

        Raises:
            InvalidOptionError: If a value is impossible.
        """
        try:
            return self.constructor()(**options)
        except SteepestError as error:
            raise InvalidOptionError(f"{where}: {error}") from error
        except (TypeError, ValueError) as error:
            raise InvalidOptionError(f"{where}: {self.name} does not take these options: {error}") from error


_ENTRIES = (
    SelectionEntry(
        "sage",
        "agreement with the mean gradient, in a sketch of the gradients (arXiv 2510.02470)",
        "steepest.selection.sage",
        "SAGE",
    ),
    SelectionEntry("random", "at random, class by class", "steepest.selection.simple", "Random"),
    SelectionEntry("el2n", "largest error of the outputs (arXiv 2107.07075)", "steepest.selection.simple", "EL2N"),
    SelectionEntry("grand", "largest gradient (arXiv 2107.07075)", "steepest.selection.simple", "GraNd"),
    SelectionEntry("herding", "means of the features kept", "steepest.selection.herding", "Herding"),
    SelectionEntry("kcenter", "features covered (arXiv 1708.00489)", "steepest.selection.k_center", "KCenter"),
    SelectionEntry(
        "gradmatch", "mean gradient matched (arXiv 2103.00123)", "steepest.selection.grad_match", "GradMatch"
    ),
)
METHODS: Mapping[str, SelectionEntry] = {entry.name: entry for entry in _ENTRIES}


@dataclass(frozen=True)
class SelectionPlan:
    """What a run selects, and when.

    Attributes:
        entry: The method.
        fraction: Share of the training samples that is kept, above 0 and at most 1.
        options: Options of the method that differ from its defaults.
        warmup: Epochs of all data before the first selection.
        every: Epochs from one selection to the next, each with the model of that moment; 0 for one selection only.
    """

    entry: SelectionEntry
    fraction: float
    options: Mapping[str, object]
    warmup: int = 1
    every: int = 0

    @property
    def text(self) -> str:
        """The one way to write it; `parse_selection` reads it back."""
        fraction = f"{self.fraction:g}" if float(f"{self.fraction:g}") == self.fraction else repr(self.fraction)
        return ":".join([self.entry.name, fraction, *(f"{name}={value}" for name, value in self._given())])

    def kept(self, num_samples: int) -> int:
        """How many samples it keeps.

        Args:
            num_samples: Of so many.

        Returns:
            The number, at least 1.
        """
        return max(1, int(self.fraction * num_samples + 0.5))

    def check(self, task: str, num_samples: int, batch_size: int, epochs: int | None) -> None:
        """See that runs can do as planned.

        Args:
            task: Name of the task, for the message.
            num_samples: Training samples it has.
            batch_size: Samples per step.
            epochs: Epochs of a run, None where only seconds end it.

        Raises:
            InvalidOptionError: If fewer samples would be kept than a batch has, or none ever.
        """
        kept = self.kept(num_samples)
        if kept < batch_size:
            raise InvalidOptionError(
                f"selection {self.text} keeps {kept} of the {num_samples} training samples of {task}, fewer than the "
                f"batch size {batch_size}: keep more, or use a smaller batch size"
            )
        if epochs is not None and self.warmup >= epochs:
            raise InvalidOptionError(
                f"selection {self.text} comes after {self.warmup} epochs of all data, and a run on {task} has "
                f"{epochs}: use fewer (warmup=0 is allowed), or more epochs"
            )

    def due(self, epoch: int) -> bool:
        """Whether there is a selection before an epoch.

        Args:
            epoch: 1 for the first.

        Returns:
            The answer.
        """
        after = epoch - 1 - self.warmup
        return after == 0 or (after > 0 and self.every > 0 and after % self.every == 0)

    def method(self, *, seed: int = 0, epoch: int = 1) -> "Method":
        """Make the method for one selection of one run.

        Args:
            seed: Seed of the run.
            epoch: The epoch before which it selects; with the seed it decides what the method draws at random.

        Returns:
            The method.
        """
        made = self.entry.constructor()(**self.options)
        return cast("Method", _reseeded(made, f"{seed}/{epoch}"))

    def _given(self) -> list[tuple[str, str]]:
        times = {"warmup": self.warmup, "every": self.every}
        changed = {name: value for name, value in times.items() if value != TIMES[name].default}
        return [(name, _text(value)) for name, value in {**self.options, **changed}.items()]


def _text(value: object) -> str:
    """An option's value as `parse_selection` reads it."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        specs = dataclass_specs(type(value))
        inside = [f"{name}={_text(item)}" for name in specs if (item := getattr(value, name)) != specs[name].default]
        return type(value).__name__ + (f"({', '.join(inside)})" if inside else "")
    return value if isinstance(value, str) else repr(value)


def _reseeded(made: Any, place: str) -> object:
    """The same options, but every seed mixed with the place: other runs and other epochs draw anew."""
    changes: dict[str, object] = {}
    for item in dataclasses.fields(made):
        value = getattr(made, item.name)
        if item.name == "seed":
            digest = hashlib.sha256(f"{value}/{place}".encode()).digest()
            changes[item.name] = int.from_bytes(digest[:4], "big") >> 1
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            changes[item.name] = _reseeded(value, place)
    return dataclasses.replace(made, **changes) if changes else made
