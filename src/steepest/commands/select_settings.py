"""Settings of `steepest select`, and the files that it writes."""

import glob
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from steepest.errors import InvalidOptionError, OutputError
from steepest.selection.arguments import Amount
from steepest.selection.method import Method
from steepest.training.checkpoint import forget
from steepest.training.compare import plan_runs
from steepest.training.files import why, write_atomically
from steepest.training.select_options import checked_options, get_method
from steepest.training.settings import Settings
from steepest.training.spec import RunSpec

__all__ = ["Places", "SelectSettings"]

_WARMUP = 2


@dataclass(frozen=True)
class SelectSettings(Settings):
    """Settings of `steepest select`; epochs, schedule and batch size are those of the models that are trained.

    Attributes:
        task: The task whose training split is chosen from.
        method: How to choose.
        options: Its options.
        fraction: Share of the samples to keep. Either this or `count`.
        count: Number of samples to keep.
        optimizer: What the scorer and the models of the check are trained with.
        seed: Seed of the scorer.
        warmup: Epochs that the scorer is trained for; None is 2.
        weights: A trained model to score with instead.
        check: Seeds to train on the subset, on random ones and on everything; 0 for none.
        checkpoint_every: Wall-clock seconds between two checkpoints.
    """

    task: str | None = None
    method: str = "sage"
    options: Mapping[str, object] = field(default_factory=dict)
    fraction: float | None = None
    count: int | None = None
    optimizer: str = "adamw"
    seed: int = 0
    warmup: int | None = None
    weights: str | None = None
    check: int = 0
    checkpoint_every: float = 30.0

    def validate(self) -> None:
        """Refuse what cannot be, before anything is read or trained.

        Raises:
            InvalidOptionError: If a value is impossible, or two settings exclude each other.
        """
        if (self.fraction is None) == (self.count is None):
            given = "neither" if self.fraction is None else "both"
            raise InvalidOptionError(f"--fraction and --count: {given} of them given, give one, as in --fraction 0.1")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise InvalidOptionError(
                f"the fraction is {self.fraction:g}: give a number above 0 and at most 1, as in 0.1"
            )
        if self.count is not None and self.count < 1:
            raise InvalidOptionError(f"the count is {self.count}: give 1 or more samples to keep")
        if self.budget_seconds is not None:
            raise InvalidOptionError("budget_seconds: models are compared at equal steps here, give epochs instead")
        if self.warmup is not None and (self.warmup < 0 or self.weights is not None):
            raise InvalidOptionError(
                f"the warm-up is {self.warmup} epochs: give 0 or more"
                if self.warmup < 0
                else "--warmup trains a scorer and --weights brings one: drop one of them"
            )
        if self.check < 0:
            raise InvalidOptionError(f"the check has {self.check} seeds: give 1 or more, or 0 for no check")
        if not 0 <= self.checkpoint_every < float("inf"):
            raise InvalidOptionError(
                f"the seconds between checkpoints are {self.checkpoint_every}: give a finite number"
            )

    def make_method(self) -> Method:
        """The method, its options checked.

        Returns:
            The method.
        """
        entry = get_method(self.method)
        return entry.make(checked_options(entry, entry.specs(), self.options), entry.name)

    def kept(self, num_samples: int) -> int:
        """How many samples are to be kept.

        Args:
            num_samples: Of so many.

        Returns:
            The number, as `select_subset` counts it.
        """
        return Amount(self.fraction, self.count).of(num_samples)

    def check_amounts(self, spec: RunSpec, num_samples: int) -> None:
        """Refuse numbers of samples that cannot be.

        Args:
            spec: Training of the check.
            num_samples: Training samples of its task.

        Raises:
            InvalidOptionError: If more are to be kept than there are, or fewer than a batch of the check has.
        """
        of = f"{num_samples:,} training samples"
        if self.count is not None and self.count > num_samples:
            raise InvalidOptionError(f"the count is {self.count:,}, {spec.task} has {of}: keep fewer")
        kept = self.kept(num_samples)
        if self.check and kept < spec.batch_size:
            raise InvalidOptionError(
                f"the selection keeps {kept} of the {of} of {spec.task}, fewer than a batch of the check has "
                f"({spec.batch_size}): keep more, use a smaller --batch-size, or drop --check"
            )

    def plan(self) -> RunSpec:
        """The training that the scorer's is a part of: the task's own epochs, and everything else as set.

        Returns:
            The run.
        """
        names = (self.task,) if self.task is not None else ()
        (spec,) = plan_runs(self._plan(names, (self.optimizer,), [self.seed], {}))
        return spec

    @property
    def trains_scorer(self) -> bool:
        """Whether a scorer is trained, if the method needs one."""
        return self.weights is None and self.warmup_epochs > 0

    @property
    def warmup_epochs(self) -> int:
        """Epochs that the scorer is trained for."""
        return _WARMUP if self.warmup is None else self.warmup


@dataclass(frozen=True)
class Places:
    """Files of a selection, all beside each other.

    Attributes:
        folder: Where they are.
        stem: Their name without suffix.
    """

    folder: Path
    stem: str

    @classmethod
    def of(cls, settings: SelectSettings, task: str) -> "Places":
        """Files of a selection by its settings.

        Args:
            settings: The settings.
            task: Name of the task.

        Returns:
            The places.

        Raises:
            InvalidOptionError: If the output is a folder.
        """
        path = Path(settings.out or f"runs/select/{task}-{settings.method}.npz")
        if path.is_dir() or not path.name:
            raise InvalidOptionError(f"the output {path} is a folder: name a file in it, as in -o subset.npz")
        # A selection is saved as a pair, and either of the two names stands for both.
        return cls(path.parent, path.name.removesuffix(".npz").removesuffix(".json"))

    @property
    def subset(self) -> Path:
        """The selection."""
        return self._named("npz")

    @property
    def words(self) -> Path:
        """The selection's report for people and other programs."""
        return self._named("json")

    @property
    def page(self) -> Path:
        """The page; it is written last."""
        return self._named("html")

    @property
    def checkpoint(self) -> Path:
        """The selection under way, a folder."""
        return self._named("checkpoint")

    def old_checkpoints(self) -> list[Path]:
        """Files in which earlier versions kept a selection under way; each of several processes had one."""
        pattern = f"{glob.escape(self.checkpoint.name)}.*-of-*"
        return [self.checkpoint, *sorted(self.folder.glob(pattern))]

    @property
    def scorer(self) -> Path:
        """The scorer."""
        return self._named("scorer.pt")

    @property
    def scorer_checkpoints(self) -> Path:
        """The scorer's training under way, a folder."""
        return self._named("scorer.checkpoints")

    @property
    def check(self) -> Path:
        """Runs of the check that are done."""
        return self._named("check.json")

    def prepare(self, *, fresh: bool, weights: str | None = None) -> None:
        """See that files can be written, and remove what is to be made anew.

        Args:
            fresh: Whether to begin anew.
            weights: A model that the user brings: it stays, even if it is the scorer of the selection before.

        Raises:
            OutputError: If they cannot; told now, and not after the training of a scorer.
        """
        probe = self._named("probe")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(probe, "can files be written here?\n")
            probe.unlink()
        except (OSError, OutputError) as error:
            raise OutputError(f"{self.subset} cannot be written ({why(error)}): name another file with -o") from error
        if fresh:
            written = (self.page, self.subset, self.words)
            forget(self.checkpoint)
            for path in (*written, *self.old_checkpoints(), self.scorer, self.check):
                if weights is None or path.resolve() != Path(weights).resolve():
                    path.unlink(missing_ok=True)
            forget(self.scorer_checkpoints)

    def _named(self, suffix: str) -> Path:
        return self.folder / f"{self.stem}.{suffix}"
