"""Files of a selection: an NPZ that holds all of it, and the same words as JSON beside it."""

import dataclasses
import io
import json
import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steepest._files import write_atomically
from steepest._versions import package_version
from steepest.errors import SelectionError
from steepest.selection.checks import check_path
from steepest.selection.report import Estimate, SelectionReport

__all__ = ["plain", "read_selection", "selection_path", "write_selection"]

_FORMAT = 1
_DTYPES = {"indices": torch.int64, "scores": torch.float32, "weights": torch.float32, "labels": torch.int64}
_UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    AttributeError,
    TypeError,
    RuntimeError,  # of zipfile: encrypted, or packed by another method
    zipfile.BadZipFile,
    zlib.error,
)
_OPTIONAL = ("scores", "labels")
_ABOUT = {"method": str, "options": dict, "num_samples": int, "fingerprint": str, "model_hash": str}


def plain(value: Any) -> Any:
    """Turn options into values that JSON has: a dataclass becomes its fields, with its name under ``type``.

    Args:
        value: Any option.

    Returns:
        Plain values; what has none is written as its repr.

    Example:
        >>> plain({"quota": (1, 2.5)})
        {'quota': [1, 2.5]}
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
        return {"type": type(value).__name__} | fields
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else repr(value)


def write_selection(
    path: Any, arrays: Mapping[str, Tensor | None], about: Mapping[str, Any], report: SelectionReport
) -> Path:
    """Write both files, each of them atomically.

    Args:
        path: With or without suffix, as the user gave it.
        arrays: indices, scores, weights, labels.
        about: Method, options, hashes.
        report: The report.

    Returns:
        Path of the NPZ file.
    """
    indices, number = arrays["indices"], about["num_samples"]
    content = {
        "format": _FORMAT,
        **plain(about),
        "kept": 0 if indices is None else len(indices),
        "fraction": 0.0 if indices is None else len(indices) / number,
        "seed": about["options"].get("seed"),
        "versions": {name: package_version(name) for name in ("steepest", "torch")},
        "report": _report_to_plain(report),
    }
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    # The words go into the NPZ too: two files cannot be renamed at once, and a pair might not belong together.
    packed: dict[str, Any] = {name: array.detach().cpu().numpy() for name, array in arrays.items() if array is not None}
    packed["about"] = np.frombuffer(text.encode(), dtype=np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, **packed)
    npz, beside = _paths(path)
    write_atomically(npz, buffer.getvalue())
    write_atomically(beside, text)
    return npz


def selection_path(path: Any) -> Path:
    """Path of the NPZ file, with or without suffix given."""
    return _paths(path)[0]


def read_selection(path: Any) -> tuple[dict[str, Any], dict[str, Any], SelectionReport]:
    """Read the NPZ file and check it.

    Args:
        path: With or without suffix, as the user gave it.

    Returns:
        Arrays, what is known about them, report.

    Raises:
        SelectionError: If the file is missing, damaged, no selection, or of a newer format.
    """
    npz, _ = _paths(path)
    remedy = "select again, or name the file that Selection.save wrote"
    try:
        # By way of memory: numpy leaves a damaged file open.
        content = npz.read_bytes()
        if not content.startswith((b"PK", b"\x93NUMPY")):  # numpy would advise to unpickle it
            raise SelectionError(f"{npz} cannot be read as a selection (it is no NPZ file): {remedy}.")
        found: Any = np.load(io.BytesIO(content), allow_pickle=False)
        if not hasattr(found, "files"):
            raise SelectionError(f"{npz} is one array and no selection: {remedy}.")
        with found as file:
            if "about" not in file.files:
                raise SelectionError(f"{npz} is no selection, it holds {', '.join(file.files) or 'nothing'}: {remedy}.")
            about = json.loads(file["about"].tobytes().decode())
            form = about.get("format") if isinstance(about, dict) else type(about).__name__
            if form != _FORMAT:
                raise SelectionError(
                    f"{npz} has selection format {form!r}, this steepest reads {_FORMAT}: read it with the version "
                    "that wrote it, or select again."
                )
            arrays = {name: _array(file, name) for name in _DTYPES}
    except FileNotFoundError as error:
        raise SelectionError(f"{npz} does not exist: {remedy}.") from error
    except _UNREADABLE as error:
        said = error.strerror if isinstance(error, OSError) else None
        reason = said or " ".join(str(error).split())[:160] or type(error).__name__
        raise SelectionError(f"{npz} cannot be read as a selection ({reason}): {remedy}.") from error
    if (problem := _problem(arrays, about)) is not None:
        raise SelectionError(f"{npz} is no usable selection, {problem}: {remedy}.")
    try:
        report = _report_from_plain(about["report"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SelectionError(f"{npz} is no usable selection, its report cannot be read ({error}): {remedy}.") from error
    return arrays, {name: about[name] for name in _ABOUT}, report


def _paths(path: Any) -> tuple[Path, Path]:
    path = check_path("path", path)
    stem = path.name.removesuffix(".npz").removesuffix(".json")
    return path.with_name(f"{stem}.npz"), path.with_name(f"{stem}.json")


def _array(file: Any, name: str) -> Tensor | None:
    if name not in file.files:
        return None
    return torch.from_numpy(np.ascontiguousarray(file[name]).copy())


def _problem(arrays: Mapping[str, Tensor | None], about: Mapping[str, Any]) -> str | None:
    """What is wrong with the content, if something is."""
    for name, kind in _ABOUT.items():
        if not isinstance(about.get(name), kind):
            return f"its {name} is missing or wrong"
    if not isinstance(about.get("report"), dict):
        return "its report is missing"
    number, indices = about["num_samples"], arrays["indices"]
    if indices is None or indices.ndim != 1 or indices.dtype != torch.int64 or not 0 < len(indices) <= number:
        return "its indices are missing or of another type or number"
    if int(indices.min()) < 0 or int(indices.max()) >= number or bool((indices.diff() <= 0).any()):
        return f"its indices are not ascending positions in {number} samples"
    lengths = {"scores": number, "weights": len(indices), "labels": number}
    for name, length in lengths.items():
        array = arrays[name]
        if array is None and name in _OPTIONAL:
            continue
        if array is None or array.dtype != _DTYPES[name] or array.shape != (length,):
            return f"its {name} are missing or of another type or number"
    return None


def _report_to_plain(report: SelectionReport) -> dict[str, Any]:
    content = {item.name: getattr(report, item.name) for item in dataclasses.fields(report)}
    if report.estimate is not None:
        content["estimate"] = dataclasses.asdict(report.estimate)
    if report.class_counts is not None:  # JSON's names are text, labels are numbers
        content["class_counts"] = [[name, *pair] for name, pair in report.class_counts.items()]
    plainly: dict[str, Any] = plain(content)
    return plainly


def _report_from_plain(content: Mapping[str, Any]) -> SelectionReport:
    """Take what is known and leave the rest: a report of a newer version must not keep anyone from the indices."""
    known = {item.name for item in dataclasses.fields(SelectionReport)}
    values = {name: value for name, value in content.items() if name in known}
    values["estimate"] = Estimate(**values["estimate"]) if values.get("estimate") else None
    counts = values.get("class_counts")
    values["class_counts"] = None if counts is None else {name: (kept, of) for name, kept, of in counts}
    values["numbers"] = {
        name: float("nan") if number is None else number for name, number in values.get("numbers", {}).items()
    }
    values["notes"] = tuple(values.get("notes", ()))
    return SelectionReport(**values)
