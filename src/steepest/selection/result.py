"""A selection: which samples to train on, with what is needed to use it safely and to find it again."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from steepest.errors import SelectionError
from steepest.selection.report import Estimate, Progress, SelectionReport
from steepest.selection.sampler import SelectionSampler
from steepest.selection.samples import Samples, fold
from steepest.selection.stored import read_selection, selection_path, write_selection

__all__ = ["Estimate", "Progress", "Selection", "SelectionReport"]


@dataclass(frozen=True, eq=False)
class Selection:
    """Samples chosen from a data set: made by `select_subset`, or read back by `Selection.load`.

    Args:
        indices: ``[k]``, int64, ascending: positions in the data that were given.
        scores: ``[N]``, float32: the method's number for every sample, kept or not; None where it has none.
        weights: ``[k]``, float32 with mean 1, in the order of ``indices``.
        labels: ``[N]``, int64; None where the data have no whole-number labels.
        method: Name of the method.
        options: Its options, in plain values.
        num_samples: Number N of samples to choose from.
        fingerprint: Hash of the data: of every sample in its order.
        model_hash: Hash of the model's parameters and buffers; empty for a method that looks at no model.
        report: What it cost and what was kept.
        writes: Whether `save` writes: of several processes that selected together the first one does, for all.

    Example:
        >>> import torch, steepest as st
        >>> from torch import nn
        >>> x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
        >>> data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> selection = st.select_subset(
        ...     model, data, nn.CrossEntropyLoss(reduction="none"), fraction=0.1, method=st.Random()
        ... )
        >>> len(selection.subset(data))
        10
    """

    indices: Tensor
    scores: Tensor | None
    weights: Tensor
    labels: Tensor | None
    method: str
    options: dict[str, Any]
    num_samples: int
    fingerprint: str
    model_hash: str
    report: SelectionReport = field(repr=False)
    writes: bool = field(default=True, repr=False)

    def __len__(self) -> int:
        return len(self.indices)

    def __repr__(self) -> str:
        return f"Selection({len(self)} of {self.num_samples} samples, method={self.method!r})"

    @property
    def fraction(self) -> float:
        """Share of the samples that was kept."""
        return len(self) / self.num_samples

    def subset(self, data: Any, *, verify: bool = True) -> Subset[Any]:
        """Return the kept samples as a data set for training.

        The data may be augmented at random in training; give the plain ones here, or ``verify=False``.

        Args:
            data: What the selection was made from: a data set of map style, a DataLoader of one, or equally long
                tensors. Of other data of the same length only with ``verify=False``.
            verify: Whether to go through the data once and compare their hash with the one of the selection.

        Returns:
            The kept samples, in ascending order of their positions.

        Raises:
            SelectionError: If the data are others, or have no positions to ask for.
        """
        if verify:
            self.check(data)
        dataset: Any = data.dataset if isinstance(data, DataLoader) else data
        if isinstance(dataset, (tuple, list)):
            if all(isinstance(part, (Tensor, np.ndarray)) for part in dataset):
                dataset = Samples(dataset).dataset
            elif len(dataset) != self.num_samples:
                raise SelectionError(
                    f"a {type(dataset).__name__} of {len(dataset)} batches has no samples by position, so no subset of "
                    "it can be made: give a data set of single samples, or tensors."
                )
        if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
            raise SelectionError(
                f"{type(dataset).__name__} has no samples by position, so no subset of it can be made: give a data set "
                "with __len__ and __getitem__, or skip in your own loop what is not in selection.indices."
            )
        self._check_length(len(dataset))
        return Subset(_as_dataset(dataset), self.indices.tolist())

    def sampler(self, seed: int = 0) -> SelectionSampler:
        """Return a sampler for a DataLoader over the whole data set, which draws the kept samples only.

        Args:
            seed: Of the order, which is another one in each epoch.

        Returns:
            A sampler of k positions per epoch: each kept sample once, or, where weights differ, drawn with
            replacement in proportion to them.
        """
        return SelectionSampler(self.indices, self.weights, seed)

    def save(self, path: str | Path) -> Path:
        """Write ``path.npz``, which is the selection, and ``path.json`` beside it, for people and other programs.

        Each file is either complete or as it was before. Nothing in them is pickled. Of several processes that
        selected together the first one writes, and the others do not wait for it.

        Args:
            path: With or without the suffix.

        Returns:
            Path of the NPZ file.
        """
        arrays = {"indices": self.indices, "scores": self.scores, "weights": self.weights, "labels": self.labels}
        about = {
            name: getattr(self, name) for name in ("method", "options", "num_samples", "fingerprint", "model_hash")
        }
        if not self.writes:
            return selection_path(path)
        return write_selection(path, arrays, about, self.report)

    @classmethod
    def load(cls, path: str | Path, data: Any = None) -> "Selection":
        """Read a selection back.

        Args:
            path: What `save` was given.
            data: The data that it was made from: they are gone through once and compared. Nothing is compared
                without it.

        Returns:
            The selection.
        """
        with torch.inference_mode(False):
            arrays, about, report = read_selection(path)
        selection = cls(**arrays, **about, report=report)
        if data is not None:
            selection.check(data)
        return selection

    def check(self, data: Any) -> None:
        """Go through the data once and refuse data that the selection was not made from.

        Args:
            data: As they were given to `select_subset`.

        Raises:
            SelectionError: If the data are others.
        """
        length = Samples(data).num_samples
        if length is not None:
            self._check_length(length)
        digest = b""
        for batch in Samples(data, labels=self.labels).batches():
            digest = fold(digest, batch)
        if digest.hex() != self.fingerprint:
            raise SelectionError(
                f"the data are not those that the selection was made from: their hash is {digest.hex()[:12]}, that of "
                f"the selection {self.fingerprint[:12]}. Positions would point to other samples: give the same data in "
                "the same order and without random augmentation (verify=False where the samples are the same and only "
                "augmented)."
            )

    def wrong_dropped(self, wrong: Tensor) -> dict[str, float]:
        """Count what became of samples whose label is known to be wrong.

        Args:
            wrong: ``[N]``, bool: the samples with a wrong label.

        Returns:
            ``wrong`` and ``wrong_kept`` (counts), ``share`` and ``share_kept`` (of all and of the kept samples that
            are wrong) and ``dropped`` (the part of the wrong ones that was not kept, nan where there are none).

        Raises:
            SelectionError: If ``wrong`` is no such mask.
        """
        if not isinstance(wrong, Tensor) or wrong.dtype != torch.bool or wrong.shape != (self.num_samples,):
            found = (
                f"{wrong.dtype} of shape {tuple(wrong.shape)}" if isinstance(wrong, Tensor) else type(wrong).__name__
            )
            raise SelectionError(
                f"wrong is {found}: give a bool tensor of shape ({self.num_samples},), True where wrong."
            )
        number, kept = int(wrong.sum()), int(wrong.cpu()[self.indices].sum())
        return {
            "wrong": number,
            "wrong_kept": kept,
            "share": number / self.num_samples,
            "share_kept": kept / len(self),
            "dropped": 1 - kept / number if number else float("nan"),
        }

    def _check_length(self, length: int) -> None:
        if length != self.num_samples:
            raise SelectionError(
                f"the data have {length} samples, the selection was made from {self.num_samples}: positions would "
                "point to other samples. Give the data that it was made from."
            )


def _as_dataset(data: Any) -> Dataset[Any]:
    dataset: Dataset[Any] = data
    return dataset
