"""Bytes of a data file, and where a task's files are."""

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path

from steepest.training.errors import DataError

__all__ = ["find_files", "read_bytes"]

_GZIP = b"\x1f\x8b"


def read_bytes(path: Path) -> bytes:
    """Read a whole file, unpacked if its content is gzip; the name does not matter.

    Args:
        path: The file.

    Returns:
        Its bytes.

    Raises:
        DataError: If it is missing, is a folder, cannot be read, or is a damaged gzip file.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder, not a file: give the file itself")
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: give the path of a file that does") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}): give a file that can") from error
    if not data.startswith(_GZIP):
        return data
    try:
        return gzip.decompress(data)
    except EOFError as error:
        raise DataError(
            f"{path} is a gzip file of {len(data):,} bytes that ends too early: it is incomplete, copy or "
            "download it again"
        ) from error
    except (OSError, zlib.error) as error:
        raise DataError(f"{path} is a damaged gzip file ({error}): copy or download it again") from error


def find_files(folder: Path, subfolder: str, wanted: Sequence[Sequence[str]], origin: str) -> tuple[Path, ...]:
    """Find the files of a task in its own folder inside the data folder, or in the data folder itself.

    All of them come from one place, so that files of two data sets with the same names are never mixed.

    Args:
        folder: The data folder.
        subfolder: The task's own folder in it.
        wanted: For each file the names it may have, the usual one first.
        origin: Where a user gets the files, in words.

    Returns:
        One path for each entry of `wanted`.

    Raises:
        DataError: If no place has them all.
    """
    places = (folder / subfolder, folder)
    missing: list[str] = []
    for place in places:
        found = [next((place / name for name in names if (place / name).is_file()), None) for names in wanted]
        absent = [names[0] for names, path in zip(wanted, found, strict=True) if path is None]
        if not absent:
            return tuple(path for path in found if path is not None)
        missing = absent if not missing or len(absent) < len(missing) else missing
    state = "" if folder.is_dir() else f" ({folder} is not a folder)"
    raise DataError(
        f"{', '.join(missing)}: not found in {places[0]} or in {folder}{state}; get the data from {origin}, put them "
        "there, or name the folder that holds them with --data or STEEPEST_DATA"
    )
