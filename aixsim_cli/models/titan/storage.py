"""DCP files on a disk: hashed while they are written, declared whole, and read without trust.

torch's own reader unpickles `.metadata` and every entry that is no tensor, which runs whatever
code they hold. Here both go through allow-lists.
"""

import mmap
import os
import pickle
from collections.abc import Iterator
from concurrent.futures import Future as FutureOf
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    FileSystemReader,
    FileSystemWriter,
    Metadata,
)
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from aixsim_cli.errors import UserError, first_line
from aixsim_cli.run.manifest import Digest, write_manifest

METADATA_FILE = ".metadata"
_DCP = "torch.distributed.checkpoint."
# all that torch writes into .metadata: dataclasses, dtypes, sizes and paths
_ALLOWED = {
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib", "WindowsPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *((f"{_DCP}filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")),
    *(
        (f"{_DCP}metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}
_PIECE_BYTES = 1 << 22


class _HashedFile:
    """A file being written, and hashed by a thread that reads it back from the page cache.

    So the hashing goes on while torch sums, writes and syncs, and costs no time of its own.
    """

    def __init__(self, path: Path, pool: ThreadPoolExecutor) -> None:
        self._file = path.open("wb")
        self._written = path.open("rb", buffering=0)
        self._pool = pool
        self._hash = sha256()
        self._flushed = self._hashed = 0
        self._done: FutureOf[None] | None = None
        self.tell = self._file.tell
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            size = self._file.write(data)
            if self._file.tell() - self._flushed >= _PIECE_BYTES:
                self.flush()
            return size
        except OSError as error:
            # torch's writer turns this into an error of its own, which does not say why
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()
        self._flushed = self._file.tell()
        self._done = self._pool.submit(self._follow)

    def fileno(self) -> int:
        # asked for by fsync, which must find all bytes out of Python's buffer
        self.flush()
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()

    def digest(self) -> Digest:
        """Of the closed file."""
        if self._done is not None:
            self._done.result()
        self._follow()
        self._written.close()
        return Digest(self._hashed, self._hash.hexdigest())

    def _follow(self) -> None:
        start, end = self._hashed, os.fstat(self._written.fileno()).st_size
        if start == end:
            return
        page = start - start % mmap.ALLOCATIONGRANULARITY
        # one long update leaves the interpreter to the writer; a loop of reads would wait for it
        with (
            mmap.mmap(
                self._written.fileno(), end - page, access=mmap.ACCESS_READ, offset=page
            ) as pages,
            memoryview(pages) as view,
        ):
            self._hash.update(view[start - page :])
        self._hashed = end


class _HashedFiles(FileSystem):
    """The file system of a writer; remembers the digest of every file written through it."""

    def __init__(self) -> None:
        self.digests: dict[str, Digest] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        if mode != "wb":
            with super().create_stream(path, mode) as plain:
                yield plain
            return
        with ThreadPoolExecutor(1) as pool:
            hashed = _HashedFile(Path(path), pool)
            try:
                yield hashed
            except Exception as error:
                raise hashed.error or error from error
            finally:
                hashed.close()
            self.digests[Path(path).name] = hashed.digest()


@dataclass(frozen=True)
class _HashedResult(WriteResult):
    """A write's result, which brings the digests of its rank's files to the coordinator."""

    digests: dict[str, Digest] = field(default_factory=dict)


class CheckpointWriter(FileSystemWriter):
    """torch's writer, whose folder ends with a manifest once every rank's files are on the disk.

    Args:
        path: the checkpoint's folder.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.fs = _HashedFiles()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = super().write_data(plan, planner).value()
        if results:
            first = results[0]
            results[0] = _HashedResult(
                first.index, first.size_in_bytes, first.storage_data, self.fs.digests
            )
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        known: dict[str, Digest] = {}
        for result in (result for of_rank in results for result in of_rank):
            known |= getattr(result, "digests", {})
        write_manifest(Path(self.path), known)


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"names {module}.{name}, which no checkpoint needs")


class CheckpointReader(FileSystemReader):
    """torch's reader, for folders of strangers: `.metadata` cannot run code or name other files.

    Args:
        path: the checkpoint's folder.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The checkpoint's index.

        Raises:
            UserError: `.metadata` is missing, damaged, or holds what no checkpoint needs.
        """
        path = Path(self.path) / METADATA_FILE
        try:
            with path.open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; expected a complete checkpoint") from None
        except pickle.UnpicklingError as error:
            raise UserError(f"{path}: refused: {error}") from None
        except Exception as error:  # a damaged pickle can raise anything
            raise UserError(f"{path}: damaged ({type(error).__name__})") from None
        if not isinstance(metadata, Metadata):
            raise UserError(f"{path}: damaged: holds {type(metadata).__name__}")
        for info in (metadata.storage_data or {}).values():
            name = str(info.relative_path)
            if name != Path(name).name or name in ("", ".", ".."):
                raise UserError(f"{path}: refused: names a file outside the folder: {name!r}")
        return self._with_load_id(metadata)

    def _with_load_id(self, metadata: Metadata) -> Metadata:
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


class CheckpointPlanner(DefaultLoadPlanner):
    """torch's planner; what is no tensor is unpickled as plain values alone."""

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        key = read_item.dest_index.fqn
        try:
            loaded = torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            raise UserError(
                f"{key}: refused: holds more than plain values: {first_line(error)}"
            ) from None
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[key], loaded)
        else:
            self.state_dict[key] = loaded


def dcp_reason(error: BaseException) -> str:
    """One line that says why a save or load failed, out of what DCP wraps around it."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
