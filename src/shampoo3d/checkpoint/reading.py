"""Reader of what ``torch.distributed.checkpoint`` wrote, without running any code that may be in it."""

import pickle
from enum import EnumMeta
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from shampoo3d.checkpoint.manifest import CheckpointError

METADATA = ".metadata"

_DESCRIPTIONS = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    (_DESCRIPTIONS, "Metadata"),
    (_DESCRIPTIONS, "MetadataIndex"),
    (_DESCRIPTIONS, "TensorStorageMetadata"),
    (_DESCRIPTIONS, "BytesStorageMetadata"),
    (_DESCRIPTIONS, "ChunkStorageMetadata"),
    (_DESCRIPTIONS, "TensorProperties"),
    (_DESCRIPTIONS, "StorageMeta"),
    (_DESCRIPTIONS, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *(("torch", dtype) for dtype in ("float64", "float32", "bfloat16", "float16", "int64")),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
    ("collections", "OrderedDict"),
}
"""All names that descriptions of tensors are unpickled with."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if (module, name) not in _ALLOWED:
            raise CheckpointError(f"refuses {module}.{name}, which is not part of a description of tensors")
        return super().find_class(module, name)


def _member(of: Any, name: str) -> Any:
    """Return the member of an enumeration, which Python 3.11.0 to 3.11.3 pickles as a call of ``getattr``."""
    if not isinstance(of, EnumMeta):
        raise CheckpointError(f"refuses builtins.getattr of {of!r}, which is not part of a description of tensors")
    return of[name]


class Reader(FileSystemReader):
    """A reader that unpickles only descriptions of tensors; PyTorch reads the tensors themselves as such."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        metadata = read_metadata(Path(self.path))
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read each stored tensor once, however many pieces of it are wanted."""
        wanted: dict[Any, list[ReadItem]] = {}
        for item in plan.items:
            wanted.setdefault(item.storage_index, []).append(item)
        for index, items in sorted(wanted.items(), key=lambda entry: self._place(entry[0])):
            stored = self._stored(index)
            for item in items:
                values = stored[tuple(slice(a, a + n) for a, n in zip(item.storage_offsets, item.lengths, strict=True))]
                into = planner.resolve_tensor(item)
                if values.shape != into.shape:
                    raise CheckpointError(f"{index.fqn} is damaged: {tuple(stored.shape)} is smaller than described")
                into.copy_(values)
                planner.commit_tensor(item, into)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _place(self, index: Any) -> tuple[str, int]:
        stored = self.storage_data[index]
        return stored.relative_path, stored.offset

    def _stored(self, index: Any) -> Tensor:
        name, offset = self._place(index)
        with (Path(self.path) / name).open("rb") as file:
            file.seek(offset)
            data = BytesIO(file.read(self.storage_data[index].length))
        stored = load_tensors_only(data, name, f" at {index.fqn}")
        if not isinstance(stored, Tensor):
            raise CheckpointError(f"{name} holds something else than tensors at {index.fqn}")
        return stored


def load_tensors_only(file: Path | BytesIO, name: str, at: str = "") -> Any:
    """Load tensors and plain data from what ``torch.save`` wrote.

    Raises:
        CheckpointError: if it holds anything else or is damaged, with the ``name`` of the file and the position.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # its own message advises to run the code in the file
        raise CheckpointError(f"{name} holds something else than tensors and plain data{at}") from None
    except Exception as error:  # a damaged file may raise anything
        raise CheckpointError(f"{name} is damaged{at}: {str(error)[:200]}") from None


def read_metadata(folder: Path) -> Metadata:
    """Read the description of all tensors in a folder.

    Raises:
        CheckpointError: if it is damaged, or holds anything else.
    """
    try:
        with (folder / METADATA).open("rb") as file:
            metadata = _Unpickler(file).load()
    except (CheckpointError, OSError) as error:
        raise CheckpointError(f"{folder / METADATA} cannot be read: {error}") from None
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(f"{folder / METADATA} is damaged: {error}") from None
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{folder / METADATA} is damaged: it holds a {type(metadata).__name__}")
    return metadata


def described(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """Return the descriptions of tensors by their keys."""
    return {key: data for key, data in metadata.state_dict_metadata.items() if isinstance(data, TensorStorageMetadata)}
