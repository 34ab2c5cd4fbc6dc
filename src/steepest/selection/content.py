"""What a batch holds, whatever its form: moved to a device, and told apart by its bytes."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steepest.errors import InvalidOptionError

__all__ = ["LABEL_KEYS", "Batch", "chain", "fold", "sample_digests", "sample_keys", "tensor_bytes", "to_device"]

# Names under which a batch that is a dict holds its labels, in the order in which they are looked for.
LABEL_KEYS = ("label", "labels", "target", "targets")

DIGEST = 32  # bytes of a digest

_PLAIN = (str, bytes, bool, int, float, complex, type(None), np.generic, torch.device, torch.dtype)
Column = tuple[memoryview, int] | list[bytes]


@dataclass(frozen=True, eq=False)
class Batch:
    """Some samples that follow each other in the data.

    Args:
        indices: ``[B]``, int64 on the CPU: positions in the data.
        content: The batch as it was collated, on the CPU.
        labels: ``[B]``, int64 on the CPU; None where the data has no whole-number labels.
    """

    indices: Tensor
    content: Any
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.indices)


def to_device(content: Any, device: torch.device | str) -> Any:
    """Move the tensors of a batch; whatever is no tensor stays as it is.

    Args:
        content: Tensors, alone or in tuples, lists and mappings, nested at will. An object with a method ``to`` of its
            own, as tokenizers return, is moved by that.
        device: Where to.

    Returns:
        The same structure; tensors are detached, those on the device already are not copied.
    """
    if isinstance(content, Tensor):
        # A tensor made in inference mode could not take part in a graph.
        return (content.clone() if content.is_inference() else content.detach()).to(device)
    if isinstance(content, _PLAIN):
        return content
    if callable(getattr(content, "to", None)):
        return content.to(device)
    if isinstance(content, Mapping):
        return {key: to_device(value, device) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        moved = [to_device(item, device) for item in content]
        if isinstance(content, list):
            return moved
        return type(content)(*moved) if hasattr(content, "_fields") else tuple(moved)
    return content


def fold(digest: bytes, batch: Batch) -> bytes:
    """Continue the fingerprint of a pass by one batch: SHA-256 of every sample, each chained to the last.

    The fingerprint depends on index, content and label of every sample. It does not depend on how the samples are
    cut into batches, unless collating does: a batch padded to its longest member has other content.

    Args:
        digest: Of everything before; ``b""`` to begin with.
        batch: The next batch.

    Returns:
        32 bytes.

    Raises:
        InvalidOptionError: If the batch holds something without bytes of its own.

    Example:
        >>> import torch
        >>> inputs = torch.arange(6.0).view(3, 2)
        >>> whole = fold(b"", Batch(torch.arange(3), inputs, None))
        >>> first = fold(b"", Batch(torch.arange(2), inputs[:2], None))
        >>> fold(first, Batch(torch.tensor([2]), inputs[2:], None)) == whole
        True
    """
    return chain(digest, sample_digests(batch))


def chain(digest: bytes, digests: bytes | memoryview) -> bytes:
    """Continue a fingerprint by samples that were digested elsewhere, such as by another process.

    Args:
        digest: Of everything before; ``b""`` to begin with.
        digests: What `sample_digests` gave, of one or more batches in their order.

    Returns:
        32 bytes.
    """
    for at in range(0, len(digests), DIGEST):
        digest = hashlib.sha256(digest + digests[at : at + DIGEST]).digest()
    return digest


def sample_digests(batch: Batch) -> bytes:
    """Digest every sample with its position and its label.

    Args:
        batch: The batch.

    Returns:
        32 bytes for each sample, one after the other.

    Raises:
        InvalidOptionError: If the batch holds something without bytes of its own.
    """
    header, columns = _columns(batch.content, len(batch))
    labels = torch.zeros_like(batch.indices) if batch.labels is None else batch.labels
    columns.append((memoryview(tensor_bytes(torch.stack([batch.indices, labels], 1))), 16))
    header += b"unlabelled" if batch.labels is None else b"labelled"
    # One call for each: updates cost more than a copy.
    return b"".join(hashlib.sha256(b"".join((header, *sample))).digest() for sample in _samples(columns, len(batch)))


def sample_keys(batch: Batch) -> list[bytes]:
    """Digest the input of every sample, without its label: samples with equal keys are duplicates.

    The input is the first item of a tuple, everything but the label of a dict, and else the whole sample.

    Args:
        batch: The batch.

    Returns:
        32 bytes for each sample.

    Raises:
        InvalidOptionError: If the batch holds something without bytes of its own.
    """
    content = batch.content
    if isinstance(content, Mapping):
        content = {key: value for key, value in content.items() if key not in LABEL_KEYS}
    elif isinstance(content, (list, tuple)) and len(content) > 1 and not _per_sample(content, len(batch)):
        content = content[0]
    header, columns = _columns(content, len(batch))
    if not columns:  # nothing tells the samples apart: none counts as a duplicate
        columns = [(memoryview(tensor_bytes(batch.indices.view(-1, 1))), 8)]
    return [hashlib.sha256(b"".join((header, *sample))).digest() for sample in _samples(columns, len(batch))]


def tensor_bytes(tensor: Tensor) -> Any:
    """Give the numbers of a tensor as bytes in row-major order, whatever its dtype, device and strides.

    Args:
        tensor: Any tensor.

    Returns:
        A buffer, without a copy where the tensor lies in order on the CPU already.
    """
    plain = tensor.detach().cpu()
    if plain.layout is not torch.strided:
        plain = plain.to_dense()
    if plain.is_quantized:
        plain = plain.int_repr()
    plain = plain.resolve_conj().resolve_neg().contiguous()
    return b"" if plain.numel() == 0 else memoryview(plain.view(-1).view(torch.uint8).numpy().data)


def _samples(columns: Sequence[Column], rows: int) -> Iterator[tuple[Any, ...]]:
    """Cut columns into samples."""
    cut: list[list[Any]] = []
    for column in columns:
        if isinstance(column, list):
            cut.append(list(column))
        else:
            data, width = column
            cut.append([data[at : at + width] for at in range(0, rows * width, width)] if width else [b""] * rows)
    return zip(*cut, strict=True)


def _columns(content: Any, rows: int | None) -> tuple[bytes, list[Column]]:
    """Split content into a digest of what all samples share and the columns that hold one part for each of them."""
    shared = hashlib.sha256()
    columns: list[Column] = []

    def visit(value: Any) -> None:
        if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
            value = torch.from_numpy(np.array(value))
        if isinstance(value, Tensor):
            per_sample = value.ndim > 0 and value.shape[0] == rows
            shared.update(f"tensor {value.dtype} {list(value.shape[1:] if per_sample else value.shape)};".encode())
            data = tensor_bytes(value)
            if per_sample and rows:
                columns.append((memoryview(data), len(data) // rows))
            else:
                shared.update(data)
        elif isinstance(value, _PLAIN):
            shared.update(f"{type(value).__name__} {value!r};".encode())
        elif isinstance(value, Mapping):
            shared.update(b"{")
            for key in sorted(value, key=repr):
                shared.update(f"{key!r}:".encode())
                visit(value[key])
            shared.update(b"}")
        elif isinstance(value, (list, tuple, np.ndarray)):
            items = value if isinstance(value, tuple) else list(value)
            if _per_sample(items, rows):
                shared.update(b"list;")
                columns.append([_whole(item) for item in items])
            else:
                shared.update(b"[")
                for item in items:
                    visit(item)
                shared.update(b"]")
        elif getattr(value, "__dict__", None):
            shared.update(type(value).__name__.encode())
            visit(vars(value))
        else:
            raise InvalidOptionError(
                f"A batch holds a {type(value).__name__}, whose content cannot be compared between passes: let the "
                "dataset or its collate_fn return tensors, numbers, strings, and lists or dicts of them."
            )

    visit(content)
    return shared.digest(), columns


def _whole(value: Any) -> bytes:
    """Digest of one value that belongs to one sample."""
    header, _ = _columns(value, None)
    return header


def _per_sample(items: Sequence[Any], rows: int | None) -> bool:
    """Whether a list has one item for each sample, and is not a list of parts that have the samples within."""
    # A list of tensors may happen to be as long as they are; a tuple that holds one such tensor is made of parts.
    parts = any if isinstance(items, tuple) else all
    return len(items) == rows and not parts(_leads(item, rows) for item in items)


def _leads(value: Any, rows: int | None) -> bool:
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim > 0 and value.shape[0] == rows
    if isinstance(value, Mapping):
        return all(_leads(item, rows) for item in value.values())
    return isinstance(value, (list, tuple)) and len(value) == rows
