"""NPZ files: named arrays, read without pickle."""

import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

from steepest.training.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["read_npz"]

# What numpy and zipfile raise on damaged files; RuntimeError is an encrypted one.
_DAMAGED = (BadZipFile, zlib.error, EOFError, OSError, ValueError, KeyError, RuntimeError, SyntaxError, OverflowError)


def read_npz(path: Path) -> "dict[str, NDArray[Any]]":
    """Read the arrays of an NPZ file.

    Args:
        path: The file.

    Returns:
        The arrays by name.

    Raises:
        DataError: If it is missing, damaged, no NPZ file, or holds Python objects.
    """
    import numpy as np

    if not path.is_file():
        state = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise DataError(f"{path} {state}: give the path of an NPZ file")
    name = None
    try:
        # Opened here: a damaged archive would leave numpy's own handle open.
        with path.open("rb") as file:
            if file.read(2) != b"PK":
                raise DataError(f"{path} is no NPZ file: write one with numpy.savez(path, X=inputs, y=targets)")
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                arrays = {}
                for name in archive.files:
                    arrays[name] = archive[name]
    except _DAMAGED as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        what = str(path) if name is None else f"array {name!r} of {path}"
        raise DataError(
            f"{what} cannot be read ({reason}): it is damaged, or it holds Python objects, which are pickles and "
            "never read; write it again from arrays of numbers or text"
        ) from error
    strange = [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]
    if strange or not arrays:
        found = f"{strange[0]!r}, which is no array" if strange else "no array"
        raise DataError(f"{path} holds {found}: write an NPZ file with numpy.savez(path, X=inputs, y=targets)")
    return arrays
