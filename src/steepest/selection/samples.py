"""Data in its own order: the samples, their positions and their labels, from whatever holds them."""

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate

from steepest._validation import check_integer
from steepest.errors import InvalidOptionError, SelectionError
from steepest.selection.content import Batch, chain, fold, sample_digests, sample_keys, to_device
from steepest.selection.labels import given_labels, labels_of
from steepest.selection.source import (
    DEFAULT_BATCH_SIZE,
    Batches,
    Mapped,
    Source,
    Streamed,
    Tensors,
    WholeBatches,
    plural,
)

__all__ = ["Batch", "Samples", "chain", "fold", "sample_digests", "sample_keys", "to_device"]

KINDS = (
    "give a Dataset, a DataLoader, a tuple of tensors (inputs, targets), or a list of batches that can be gone "
    "through more than once"
)


class Samples:
    """The samples of any data, batch by batch in the data's own order, with the incomplete last batch.

    A `DataLoader` lends its dataset, batch size, collate function and workers; its sampler and its shuffling are not
    used, so that index n is the n-th sample of what was given whatever the loader does. Streams (`IterableDataset`)
    are read in the main process, because several workers would change their order. Data with random augmentation
    gives other content in every pass, which `fold` shows: give the plain data.

    Args:
        data: A map-style dataset (also one of Hugging Face), a `DataLoader`, an `IterableDataset`, equally long
            tensors or arrays ``(inputs, targets)``, or batches that can be gone through more than once. A list or
            tuple that holds nothing but tensors is data and not batches.
        labels: ``[N]``, whole numbers. By default the second item of a batch that is a tuple, or the item
            "label", "labels", "target" or "targets" of one that is a dict, where it is whole numbers of shape ``[B]``.
        batch_size: Samples per batch; by default the loader's own, or 256.

    Raises:
        InvalidOptionError: If the data is of no such kind, empty or gone after one pass, or an option is impossible.

    Example:
        >>> import torch
        >>> samples = Samples((torch.zeros(5, 3), torch.tensor([0, 1, 1, 0, 2])), batch_size=2)
        >>> [batch.indices.tolist() for batch in samples.batches()]
        [[0, 1], [2, 3], [4]]
        >>> [batch.labels.tolist() for batch in samples.batches(start=2)]
        [[2]]
    """

    def __init__(self, data: Any, *, labels: Any = None, batch_size: int | None = None) -> None:
        if batch_size is not None:
            check_integer("batch_size", batch_size, low=1)
        self._source = _source(data, batch_size)
        self._num_samples = self._source.num_samples
        if self._num_samples == 0:
            raise InvalidOptionError(f"The data ({type(data).__name__}) is empty: give at least one sample.")
        self._given = None if labels is None else given_labels(labels)
        self._labelled: bool | None = None
        self._passes = 0
        if self._num_samples is not None:
            self._check_given(self._num_samples)

    def __repr__(self) -> str:
        known = "unknown" if self._num_samples is None else self._num_samples
        return f"Samples({type(self.dataset).__name__}, samples={known}, batch_size={self.batch_size})"

    @property
    def dataset(self) -> Any:
        """What the indices point into: the dataset of a loader, a `TensorDataset` of tensors, else the data itself."""
        return self._source.dataset

    @property
    def num_samples(self) -> int | None:
        """Number of samples N; None for data that does not know before it has been gone through."""
        return self._num_samples

    @property
    def batch_size(self) -> int | None:
        """Samples per batch; None for batches that came as they are."""
        return self._source.batch_size

    @property
    def num_batches(self) -> int | None:
        """Batches per pass, None while unknown."""
        if self.batch_size is not None and self._num_samples is not None:
            return -(-self._num_samples // self.batch_size)
        return self._source.num_batches

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Go through the data once.

        Args:
            start: Number of batches to leave out at the beginning.
            stop: Number of the batch to stop before.

        Yields:
            The batches from there to the end, the incomplete last one included.

        Raises:
            InvalidOptionError: If a batch cannot be collated or told apart in samples, or labels are missing.
            SelectionError: If the data has another length than in the pass before.
        """
        check_integer("start", start, low=0)
        number, self._passes = self._passes, self._passes + 1
        end = 0
        for position, content, size in self._source.contents(start, stop, number):
            end = position + size
            yield Batch(torch.arange(position, end, device="cpu"), content, self._labels(content, position, size))
        # A start beyond the end of a stream says nothing about its length.
        if stop is None and (start == 0 or end > 0):
            self.conclude(end)

    def first(self) -> Batch | None:
        """The first batch; None where there is none."""
        return next(iter(self.batches(0, 1)), None)

    def conclude(self, end: int) -> None:
        """Note the length after a whole pass, or refuse one that differs.

        Args:
            end: How many samples there were.

        Raises:
            InvalidOptionError: If there were none.
            SelectionError: If there were as many as never before.
        """
        if end == 0 and self._num_samples is None:
            raise InvalidOptionError(f"The data ({type(self.dataset).__name__}) is empty: give at least one sample.")
        if self._num_samples is not None and end != self._num_samples:
            raise SelectionError(
                f"The data changed between passes: it gave {plural(self._num_samples, 'sample')} in one pass and {end} "
                "in the next. Give data that begins anew and gives the same samples every time it is iterated."
            )
        if self._num_samples is None:
            self._check_given(end)
            self._num_samples = end

    def _check_given(self, samples: int) -> None:
        if self._given is not None and len(self._given) != samples:
            raise InvalidOptionError(
                f"labels has {plural(len(self._given), 'entry', 'entries')} and the data {plural(samples, 'sample')}: "
                "give one label for each sample, in the data's own order."
            )

    def _labels(self, content: Any, position: int, size: int) -> Tensor | None:
        if self._given is not None:
            if position + size > len(self._given):
                self._check_given(position + size)
            return self._given[position : position + size]
        found = labels_of(content, size)
        if self._labelled is None:
            self._labelled = found is not None
        elif self._labelled != (found is not None):
            raise InvalidOptionError(
                f"The batch of samples {position} to {position + size - 1} {'lacks' if self._labelled else 'has'} "
                "whole-number labels, unlike those before it: give labels= for all samples, or make the batches alike."
            )
        return found


def _source(data: Any, batch_size: int | None) -> Source:
    """Find out what the data is."""
    if isinstance(data, DataLoader):
        return _from_loader(data, batch_size)
    size = batch_size or DEFAULT_BATCH_SIZE
    if type(data) is TensorDataset:
        return Tensors(data.tensors, size, data)
    if isinstance(data, IterableDataset) or (_of_hugging_face(data) and not hasattr(data, "__getitem__")):
        return Streamed(data, size, default_collate)
    if isinstance(data, (list, tuple)):
        return _from_sequence(data, batch_size)
    kind = type(data).__name__
    if isinstance(data, (Tensor, np.ndarray)):
        raise InvalidOptionError(f"The data is a single {kind}: give a tuple, (inputs, targets) or (inputs,).")
    if isinstance(data, Mapping):
        raise InvalidOptionError(
            f"The data is a {kind} with the keys {', '.join(map(repr, islice(data, 5)))}: give one of its parts if it "
            "holds several splits, or a tuple of tensors (inputs, targets)."
        )
    if isinstance(data, (str, bytes)) or data is None:
        raise InvalidOptionError(f"The data is {data!r}: {KINDS}.")
    if isinstance(data, Iterator):
        raise InvalidOptionError(
            f"The data is a {kind}, which is gone after one pass, and selection takes several: make a list of its "
            "batches, or give an object whose __iter__ begins anew, such as a Dataset or a DataLoader."
        )
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return Mapped(data, size, default_collate)
    if hasattr(data, "__iter__"):
        return _ready(data, batch_size)
    raise InvalidOptionError(f"The data is a {kind}: {KINDS}.")


def _from_sequence(data: Any, batch_size: int | None) -> Source:
    """Tensors side by side, or batches one after the other."""
    if not data:
        raise InvalidOptionError(f"The data is an empty {type(data).__name__}: {KINDS}.")
    if not all(isinstance(item, (Tensor, np.ndarray)) for item in data):
        return _ready(data, batch_size)
    tensors = tuple(item if isinstance(item, Tensor) else torch.from_numpy(np.array(item)) for item in data)
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
    if any(tensor.ndim == 0 for tensor in tensors) or len({len(tensor) for tensor in tensors}) > 1:
        raise InvalidOptionError(
            f"The tensors of the data have shapes {shapes}, which are not equally many samples: give tensors of one "
            "length; if they are meant to be batches, give each as a tuple, (inputs,)."
        )
    return Tensors(tensors, batch_size or DEFAULT_BATCH_SIZE, TensorDataset(*tensors))


def _ready(data: Any, batch_size: int | None, dataset: Any = None) -> Source:
    if batch_size is not None:
        raise InvalidOptionError(
            f"batch_size={batch_size} was given with data that comes in batches of its own: leave it out, or give a "
            "Dataset of single samples."
        )
    return Batches(data, dataset)


def _from_loader(loader: DataLoader[Any], batch_size: int | None) -> Source:
    """Take over all of a loader that does not touch the order of its samples."""
    dataset: Any = loader.dataset
    collate: Callable[[Any], Any] = loader.collate_fn
    streamed = isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")
    if loader.batch_size is None and loader.batch_sampler is None:
        if streamed:  # the stream gives whole batches
            return _ready(WholeBatches(dataset, collate), batch_size, dataset)
        raise InvalidOptionError(
            "The DataLoader makes no batches (batch_size=None), so it does not say which samples belong together: "
            "give it a batch_size, or give the dataset itself."
        )
    own = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    size = batch_size or (own if isinstance(own, int) and own > 0 else DEFAULT_BATCH_SIZE)
    if streamed:
        return Streamed(dataset, size, collate)
    if type(dataset) is TensorDataset and collate is default_collate:
        return Tensors(dataset.tensors, size, dataset)
    if not hasattr(dataset, "__len__"):
        raise InvalidOptionError(
            f"The dataset of the DataLoader ({type(dataset).__name__}) has no length, so its own order has no end: "
            "give it a __len__, or make it an IterableDataset."
        )
    return Mapped(dataset, size, collate, loader)


def _of_hugging_face(data: Any) -> bool:
    return type(data).__module__.partition(".")[0] == "datasets"
