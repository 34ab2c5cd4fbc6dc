"""Tensors in files of torch.distributed.checkpoint, written with their digests and read without trusting them.

Only tensors go there. torch itself would unpickle the list of them, and everything that is no tensor, as it stands:
here the list may name nothing but what such a list is made of, and there is nothing else.
"""

import hashlib
import io
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from steepest.distributed import Ranks
from steepest.distributed.contact import contact
from steepest.errors import DamagedCheckpointError

__all__ = ["METADATA", "load_metadata", "read_tensors", "write_tensors"]

METADATA = ".metadata"
_HERE = "torch.distributed.checkpoint"
_ALLOWED = {
    (f"{_HERE}.metadata", "Metadata"),
    (f"{_HERE}.metadata", "TensorStorageMetadata"),
    (f"{_HERE}.metadata", "TensorProperties"),
    (f"{_HERE}.metadata", "ChunkStorageMetadata"),
    (f"{_HERE}.metadata", "MetadataIndex"),
    (f"{_HERE}.metadata", "StorageMeta"),
    (f"{_HERE}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_HERE}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks | None) -> dict[str, tuple[int, str]]:
    """Write tensors into a folder; every rank writes a part, and all must come here.

    What several ranks have under one name is written by one of them, and taken to be the same. DTensors are written as
    they lie, each rank its shard.

    Args:
        folder: An empty folder that all ranks see.
        tensors: By name.
        ranks: The ranks; None for one process alone.

    Returns:
        The files that this rank wrote, with their sizes and SHA-256; they are on disk.

    Raises:
        OSError: If this rank could not write.
    """
    writer = _Writer(folder)
    with contact(), _torch_errors(ranks, writer.files):
        save(
            dict(tensors),
            storage_writer=writer,
            planner=DefaultSavePlanner(flatten_state_dict=False),
            process_group=None if ranks is None else ranks.group,
            no_dist=ranks is None,
        )
    return writer.files.written


def read_tensors(folder: Path, into: Mapping[str, Tensor], ranks: Ranks | None) -> None:
    """Read tensors in place, whatever number of ranks wrote them. All ranks must come here.

    Args:
        folder: What `write_tensors` wrote to.
        into: Tensors of the shapes that were written, by name; of DTensors each rank reads its shard. Names may differ
            between ranks.
        ranks: The ranks; None for one process alone.

    Raises:
        DamagedCheckpointError: If they are not there, or cannot be read.
    """
    reader = _Reader(folder, load_metadata(folder))
    try:
        with _torch_errors(ranks):
            load(
                dict(into),
                storage_reader=reader,
                planner=DefaultLoadPlanner(flatten_state_dict=False),
                process_group=None if ranks is None else ranks.group,
                no_dist=ranks is None,
            )
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise DamagedCheckpointError(f"{folder} cannot be read ({type(error).__name__}: {reason})") from error


def load_metadata(folder: Path) -> Metadata:
    """Read the list of tensors.

    Args:
        folder: What `write_tensors` wrote to.

    Returns:
        The list.

    Raises:
        DamagedCheckpointError: If it is no such list, or names what such a list does not need, or files elsewhere.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            return _checked(_Unpickler(file).load())
    except Exception as error:  # pickle raises whatever its input leads it to
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())[:160]
        raise DamagedCheckpointError(f"{path} cannot be read ({reason or type(error).__name__})") from error


def _checked(found: object) -> Metadata:
    if not isinstance(found, Metadata):
        raise pickle.UnpicklingError(f"it holds a {type(found).__name__} and no list of tensors")
    if not all(isinstance(item, TensorStorageMetadata) for item in found.state_dict_metadata.values()):
        raise pickle.UnpicklingError("it lists something that is no tensor")
    for item in found.storage_data.values():
        if Path(item.relative_path).name != item.relative_path:
            raise pickle.UnpicklingError(f"it names a file outside of its folder, {item.relative_path}")
    return found


class _Unpickler(pickle.Unpickler):  # noqa: S301 - it looks up nothing but what is allowed
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no list of tensors needs")


class _Writer(FileSystemWriter):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.fs = self.files = _Files()

    def storage_meta(self) -> StorageMeta:
        """Say nothing of the folder, which gets another name when it is complete."""
        return StorageMeta()


class _Reader(FileSystemReader):
    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        del args, kwargs
        return self._metadata


class _Files(FileSystem):
    """Files whose digests are made while they are written."""

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[str, tuple[int, str]] = {}
        self.failure: OSError | None = None

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        try:
            with super().create_stream(path, mode) as stream:
                file = _Hashing(stream, self)
                yield file
            self.written[Path(path).name] = (file.size, file.digest.hexdigest())
        except OSError as error:
            self.failure = error
            raise

    def rename(self, path: Any, new_path: Any) -> None:
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)


class _Hashing(io.IOBase):
    """A file that is only written to."""

    def __init__(self, stream: io.IOBase, files: _Files) -> None:
        self._stream, self._files = stream, files
        self.digest, self.size = hashlib.sha256(), 0

    def write(self, content: Any) -> int:
        try:
            self._stream.write(content)
        except OSError as error:  # torch turns it into an error that does not say why
            self._files.failure = error
            raise
        self.digest.update(content)
        number = memoryview(content).nbytes
        self.size += number
        return number

    def tell(self) -> int:
        return self._stream.tell()

    def flush(self) -> None:
        if not self._stream.closed:
            self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def close(self) -> None:
        self._stream.close()
        super().close()


@contextmanager
def _torch_errors(ranks: Ranks | None, files: _Files | None = None) -> Iterator[None]:
    """Raise what went wrong on this rank; torch wraps it, on all ranks, into something that is no Exception.

    On a rank where nothing went wrong with writing nothing is raised: the other one will tell.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is")  # there is one process, on purpose
            yield
    except CheckpointException as error:
        if files is not None and files.failure is not None:
            raise files.failure from error
        found = {rank: failure for rank, (failure, _) in error.failures.items()}
        mine = found.get(0 if ranks is None else ranks.rank)
        ends = next((failure for failure in found.values() if not isinstance(failure, Exception)), None)
        if mine is not None or ends is not None or files is None:
            raise mine or ends or next(iter(found.values())) from error
