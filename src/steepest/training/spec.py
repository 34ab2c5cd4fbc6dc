"""One run, described completely: two equal descriptions give the same numbers on the same machine."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

from steepest._versions import package_version
from steepest.training.convert import plain
from steepest.training.source import Source
from steepest.training.task import Schedule

__all__ = ["RunSpec"]


@dataclass(frozen=True)
class RunSpec:
    """A run to be made.

    Attributes:
        task: Name of the task.
        optimizer: Name of the optimizer.
        options: Options given to the optimizer's constructor.
        seed: Seed of initialisation and data order.
        data_seed: Seed of the splits, the same for all runs that are compared.
        epochs: Most passes over the training split; None leaves only the seconds.
        seconds: Most seconds of training, evaluation not counted; None leaves only the epochs.
        schedule: Learning rate over the budget: as given (constant), falling linearly to zero, as given for
            three fifths and falling to zero then (trapezoidal), or (auto) constant where the optimizer finds the
            lengths of its steps itself and linear elsewhere.
        batch_size: Samples per step.
        device: Torch device.
        threads: Threads of torch on CPU; one is steadiest and, for small models, as fast as more.
        select: What is selected to train on, as `SelectionPlan.text` writes it; None trains on everything.
        source: Where the task comes from; None means the registry's task of that name.
        options_source: How the options were chosen, for people; it decides no number.
        untuned: Whether nobody chose the learning rate for this task; it decides no number either.
    """

    task: str
    optimizer: str
    options: Mapping[str, object] = field(default_factory=dict)
    seed: int = 0
    data_seed: int = 0
    epochs: int | None = None
    seconds: float | None = None
    schedule: Schedule = "linear"
    batch_size: int = 32
    device: str = "cpu"
    threads: int | None = 1
    select: str | None = None
    source: Source | None = None
    options_source: str = "as given"
    untuned: bool = False

    def origin(self) -> Source:
        """Where the task comes from; the registry, unless the run says otherwise."""
        return self.source or Source(self.task)

    def key(self) -> str:
        """Short hash of everything that decides the run's numbers, versions included.

        Returns:
            12 hexadecimal digits.
        """
        content = asdict(replace(self, options={}, source=None)) | {"options": plain(self.options)}
        del content["options_source"], content["untuned"]
        if self.select is None:
            del content["select"]  # as if there were no such thing: runs on everything keep the keys that they had
        content["source"] = plain(self.origin().identity())
        content |= {"steepest": package_version("steepest"), "torch": package_version("torch")}
        text = json.dumps(content, sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:12]
