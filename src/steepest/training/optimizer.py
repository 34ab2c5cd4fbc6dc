"""What an optimizer entry is: constructor, how it takes a step, own defaults, range to tune."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from steepest.training.options import OptionSpec, option_specs
from steepest.training.steps import StepFunction
from steepest.training.task import Kind

__all__ = ["Diagnosis", "OptimizerEntry"]

Diagnosis = Mapping[str, float | tuple[float, ...]]


def _no_diagnostics(_optimizer: torch.optim.Optimizer) -> Diagnosis:
    return {}


def _no_schedule(_optimizer: torch.optim.Optimizer, _fraction: float) -> None:
    """What an optimizer whose options stay as they are does before a step."""


def _by_its_rate(_options: Mapping[str, object]) -> bool:
    return False


@dataclass(frozen=True)
class OptimizerEntry:
    """One entry of the optimizer registry.

    Attributes:
        name: Name on the command line.
        label: Name in tables and plots.
        description: One line for people.
        constructor: Returns the class; called late, so that an entry imports nothing heavy.
        takes: What the constructor's first argument is.
        step: How it takes a step, given its options.
        lr_range: Smallest and largest learning rate of the tuning grid.
        options: Options that differ from the constructor's defaults in every task.
        kind_options: The same for the tasks of one kind.
        full_batch: Whether every step is on the whole training split, whatever the batch size of the others. An epoch
            is then one step, and a comparison by epochs means little: compare by seconds.
        anneal: Sets options that follow the budget, other than the learning rate; called before every step with the
            optimizer and the part of the budget that is spent, 0 to 1. It must depend on nothing else, so that a
            continued run goes on with the same values.
        finds_length: Whether, with these options, it finds the lengths of its steps itself: the schedule "auto" then
            leaves the learning rate as it is.
        diagnose: Numbers about the last step, and rows of numbers, for the records.
        colour: Its colour in plots.
    """

    name: str
    label: str
    description: str
    constructor: Callable[[], Callable[..., torch.optim.Optimizer]]
    takes: Literal["model", "parameters"]
    step: Callable[[Mapping[str, object]], StepFunction]
    lr_range: tuple[float, float]
    options: Mapping[str, object] = field(default_factory=dict)
    kind_options: Mapping[Kind, Mapping[str, object]] = field(default_factory=dict)
    full_batch: bool = False
    anneal: Callable[[torch.optim.Optimizer, float], None] = _no_schedule
    finds_length: Callable[[Mapping[str, object]], bool] = _by_its_rate
    diagnose: Callable[[torch.optim.Optimizer], Diagnosis] = _no_diagnostics
    colour: str = "#444444"

    def specs(self) -> dict[str, OptionSpec]:
        """Options that a user may set, read from the constructor's signature.

        Returns:
            Specification by option name.
        """
        return option_specs(self.constructor())

    def build(self, model: nn.Module, options: Mapping[str, object]) -> torch.optim.Optimizer:
        """Make the optimizer for a model.

        Args:
            model: The model to train.
            options: Checked options.

        Returns:
            The optimizer.
        """
        subject = model if self.takes == "model" else model.parameters()
        return self.constructor()(subject, **options)
