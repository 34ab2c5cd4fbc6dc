"""The kinds of data that there are, each read in its own order."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from steepest.errors import InvalidOptionError
from steepest.selection.content import to_device
from steepest.selection.labels import is_sample

__all__ = ["DEFAULT_BATCH_SIZE", "Batches", "Mapped", "Source", "Streamed", "Tensors", "WholeBatches", "plural"]

DEFAULT_BATCH_SIZE = 256
Collate = Callable[[Any], Any]


class Source(ABC):
    """One kind of data.

    Attributes:
        dataset: What the indices point into.
        num_samples: None where it is unknown.
        batch_size: None where the batches come as they are.
        num_batches: None where it is unknown, or follows from the two others.
    """

    dataset: Any
    num_samples: int | None = None
    batch_size: int | None = None
    num_batches: int | None = None

    @abstractmethod
    def contents(self, start: int, stop: int | None, number: int) -> Iterator[tuple[int, Any, int]]:
        """Go through the batches from ``start`` to ``stop``, for the ``number``-th time: position, content and size."""


class Tensors(Source):
    """Equally long tensors: slices, nothing is collated."""

    def __init__(self, tensors: Sequence[Tensor], batch_size: int, dataset: Any) -> None:
        self._tensors, self.batch_size, self.dataset = tuple(tensors), batch_size, dataset
        self.num_samples = len(self._tensors[0])

    def contents(self, start: int, stop: int | None, number: int) -> Iterator[tuple[int, Any, int]]:
        """Cut slices."""
        del number
        total, size = len(self._tensors[0]), self.batch_size or DEFAULT_BATCH_SIZE
        for position in range(start * size, _limit(stop, size, total), size):
            content = to_device(tuple(tensor[position : position + size] for tensor in self._tensors), "cpu")
            yield position, content, min(size, total - position)


class Mapped(Source):
    """A dataset with a length and an item for every position, collated by a loader of our own."""

    def __init__(self, dataset: Any, batch_size: int, collate: Collate, loader: DataLoader[Any] | None = None) -> None:
        self.dataset, self.batch_size, self._collate = dataset, batch_size, _Collate(collate)
        try:
            self.num_samples = len(dataset)
        except (TypeError, NotImplementedError) as error:
            raise InvalidOptionError(
                f"The dataset ({type(dataset).__name__}) does not know its length: give it a __len__, or make it an "
                "IterableDataset."
            ) from error
        self._workers: dict[str, Any] = {}
        if loader is not None and loader.num_workers > 0:
            names = ("num_workers", "worker_init_fn", "multiprocessing_context", "timeout", "prefetch_factor")
            self._workers = {name: getattr(loader, name) for name in names}

    def contents(self, start: int, stop: int | None, number: int) -> Iterator[tuple[int, Any, int]]:
        """Fetch the samples in order, in the workers of the user's loader where it has some."""
        size = self.batch_size or DEFAULT_BATCH_SIZE
        positions = range(start * size, _limit(stop, size, self.num_samples or 0))
        if not positions:
            return
        with warnings.catch_warnings():  # of too many workers: the user's own loader has said so
            warnings.filterwarnings("ignore", "This DataLoader will create")
            loader = DataLoader(
                self.dataset,
                batch_size=size,
                sampler=positions,
                collate_fn=self._collate,
                generator=_generator(number),
                **self._workers,
            )
        position = start * size
        for content, length in map(_checked, _begin(loader)):
            yield position, content, length
            position += length


class Streamed(Source):
    """Samples that can only be gone through, in the main process: workers would change their order."""

    def __init__(self, dataset: Any, batch_size: int, collate: Collate) -> None:
        self.dataset, self.batch_size, self._collate = dataset, batch_size, _Collate(collate)

    def contents(self, start: int, stop: int | None, number: int) -> Iterator[tuple[int, Any, int]]:
        """Go through the stream, and past the batches before ``start``."""
        loader = DataLoader(
            _stream(self.dataset), batch_size=self.batch_size, collate_fn=self._collate, generator=_generator(number)
        )
        position = start * (self.batch_size or DEFAULT_BATCH_SIZE)
        for content, length in map(_checked, islice(_begin(loader), start, stop)):
            yield position, content, length
            position += length


class Batches(Source):
    """Batches made by the user, whose sizes are read off their tensors."""

    def __init__(self, data: Any, dataset: Any = None) -> None:
        self._data, self.dataset = data, data if dataset is None else dataset
        self.num_batches = len(data) if isinstance(data, (list, tuple)) else None

    def contents(self, start: int, stop: int | None, number: int) -> Iterator[tuple[int, Any, int]]:
        """Go through the batches, and past those before ``start``."""
        del number
        position = 0
        for count, content in enumerate(islice(self._data, stop)):
            size = _size(content, count)
            if count >= start:
                yield position, to_device(content, "cpu"), size
            position += size


class WholeBatches:
    """A stream that gives whole batches, read anew without workers each time it is gone through.

    Args:
        dataset: The stream.
        collate: What the user's loader does with each of them.
    """

    def __init__(self, dataset: Any, collate: Collate) -> None:
        self._loader = DataLoader(_stream(dataset), batch_size=None, collate_fn=collate, generator=_generator(0))

    def __iter__(self) -> Iterator[Any]:
        return _begin(self._loader)


class _Stream(IterableDataset[Any]):
    """Makes a stream of torch out of anything iterable."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def __iter__(self) -> Iterator[Any]:
        return iter(self._data)


class _Failed(str):
    """Why samples could not be collated: a worker cannot raise an error with its message untouched."""

    __slots__ = ()


class _Collate:
    """Collates, and counts what it was given. A class, so that workers can be sent it."""

    def __init__(self, collate: Collate) -> None:
        self._collate = collate

    def __call__(self, items: Any) -> tuple[Any, int]:
        try:
            with torch.device("cpu"):
                return self._collate(items), len(items)
        except (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            return _Failed(f"{type(error).__name__}: {error}".splitlines()[0]), len(items)


def _checked(collated: tuple[Any, int]) -> tuple[Any, int]:
    content, length = collated
    if isinstance(content, _Failed):
        raise InvalidOptionError(
            f"{plural(length, 'sample')} could not be made into a batch ({content}). Samples of a batch must have "
            "equal shapes and one structure: give a DataLoader with a collate_fn that pads them, or with batch_size=1."
        )
    return to_device(content, "cpu"), length


def _stream(dataset: Any) -> "IterableDataset[Any]":
    return dataset if isinstance(dataset, IterableDataset) else _Stream(dataset)


def _limit(stop: int | None, size: int, total: int) -> int:
    """Where batches end, in samples."""
    return total if stop is None else min(stop * size, total)


def _begin(loader: "DataLoader[Any]") -> Iterator[Any]:
    """Begin a pass: a loader draws its seed on the default device, where our generator may not be."""
    with torch.device("cpu"):
        return iter(loader)


def _generator(number: int) -> torch.Generator:
    """Make a generator for the loader alone, so that the user's random numbers stay untouched."""
    # Every pass has another seed: if workers augment the data at random, the passes differ and it is found out.
    return torch.Generator("cpu").manual_seed(number)


def _size(content: Any, count: int) -> int:
    """Number of samples in a batch that the user made."""
    lengths = dict.fromkeys(() if is_sample(content) else _lengths(content))
    if len(lengths) == 1 and 0 not in lengths:
        return int(next(iter(lengths)))
    if not lengths:
        raise InvalidOptionError(
            f"Item {count} of the data is a {_kind(content)}, no batch of tensors with the samples along dimension 0: "
            "give batches such as (inputs, targets); give a list of single samples as DataLoader(samples, batch_size)."
        )
    if len(lengths) == 1:
        raise InvalidOptionError(f"Batch {count} of the data is empty: remove it.")
    raise InvalidOptionError(
        f"The tensors in batch {count} of the data have lengths {', '.join(map(str, lengths))} along dimension 0: give "
        "batches in which every tensor has one entry for each sample; give single samples as DataLoader(samples)."
    )


def _lengths(content: Any) -> Iterator[int]:
    if isinstance(content, (Tensor, np.ndarray)):
        if content.ndim > 0:
            yield content.shape[0]
    elif isinstance(content, Mapping):
        for value in content.values():
            yield from _lengths(value)
    elif isinstance(content, (list, tuple)):
        for value in content:
            yield from _lengths(value)


def _kind(content: Any) -> str:
    if isinstance(content, (list, tuple)):
        return f"{type(content).__name__} of {', '.join(type(item).__name__ for item in content[:3])}"
    return type(content).__name__


def plural(number: int, one: str, many: str | None = None) -> str:
    """Count things in words.

    Args:
        number: How many.
        one: The word for one.
        many: The word for several; by default with an s.

    Returns:
        Number and word.
    """
    return f"{number} {one if number == 1 else many or one + 's'}"
