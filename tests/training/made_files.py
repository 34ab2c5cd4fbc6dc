"""Files made by hand, for the tests of the readers."""

from __future__ import annotations

from pathlib import Path


def written(folder: Path, content: bytes | str, name: str = "made") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path
