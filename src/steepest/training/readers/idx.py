"""IDX files, the format of MNIST and its relatives."""

import math
from pathlib import Path

import torch
from torch import Tensor

from steepest.training.errors import DataError
from steepest.training.readers.files import read_bytes

__all__ = ["read_idx"]

_UINT8 = 0x08
_OTHER_TYPES = {0x09: "int8", 0x0B: "int16", 0x0C: "int32", 0x0D: "float32", 0x0E: "float64"}
_AGAIN = "copy or download it again"


def read_idx(path: Path) -> Tensor:
    """Read an IDX file of unsigned bytes, plain or gzip.

    Args:
        path: The file.

    Returns:
        uint8 tensor of the shape in the file's header.

    Raises:
        DataError: If it is no such file, is cut short or has bytes left over.
    """
    data = read_bytes(path)
    shape = _shape(path, data)
    start, size = 4 + 4 * len(shape), math.prod(shape)
    if size == 0:
        raise DataError(f"{path} has shape {shape} in its header: there is nothing in it, {_AGAIN}")
    if len(data) != start + size:
        found = len(data) - start
        state = "it is incomplete" if found < size else "it has bytes left over"
        raise DataError(
            f"{path} has shape {shape} in its header, which is {size:,} bytes, and {found:,} bytes after the "
            f"header: {state}, {_AGAIN}"
        )
    return torch.frombuffer(bytearray(data[start:]), dtype=torch.uint8).reshape(shape)


def _shape(path: Path, data: bytes) -> tuple[int, ...]:
    if len(data) < 4:
        raise DataError(f"{path} has {len(data)} bytes, an IDX file has a header of 8 at least: {_AGAIN}")
    zeros, code, dimensions = data[:2], data[2], data[3]
    if zeros != b"\0\0" or (code != _UINT8 and code not in _OTHER_TYPES):
        raise DataError(
            f"{path} is no IDX file: it begins with the bytes {data[:4].hex(' ')}, an IDX file of unsigned bytes "
            "with 00 00 08; give the file itself, plain or gzip"
        )
    if code != _UINT8:
        raise DataError(
            f"{path} holds {_OTHER_TYPES[code]} values (type byte 0x{code:02x}), only unsigned bytes (0x08) can be "
            "used: write it again as unsigned bytes"
        )
    if dimensions == 0 or len(data) < 4 + 4 * dimensions:
        raise DataError(
            f"{path} has {dimensions} dimensions in its header and {len(data)} bytes in all: the header is not "
            f"complete, {_AGAIN}"
        )
    return tuple(int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions))
