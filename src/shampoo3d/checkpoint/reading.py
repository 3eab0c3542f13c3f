"""Reads what ``torch.distributed.checkpoint`` wrote, without running anything that may stand in it."""

import pickle
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
"""All that descriptions of tensors are made of."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise CheckpointError(f"refuses {module}.{name}, which no description of tensors is made of")
        return super().find_class(module, name)


class Reader(FileSystemReader):
    """A reader that unpickles descriptions of tensors only; the tensors themselves PyTorch reads as such."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        metadata = read_metadata(Path(self.path))
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read each stored tensor once, whatever number of pieces of it is wanted."""
        wanted: dict[Any, list[ReadItem]] = {}
        for item in plan.items:
            wanted.setdefault(item.storage_index, []).append(item)
        for index, items in sorted(wanted.items(), key=lambda of: self._place(of[0])):
            stored = self._stored(index)
            for item in items:
                values = stored[tuple(slice(a, a + n) for a, n in zip(item.storage_offsets, item.lengths, strict=True))]
                into = planner.resolve_tensor(item)
                if values.shape != into.shape:
                    raise CheckpointError(f"{index.fqn} is damaged: {tuple(stored.shape)} where more was described")
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
    """Tensors and plain data from what ``torch.save`` wrote.

    Raises:
        CheckpointError: if something else stands there or it is damaged, with the ``name`` of the file and where.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # whose advice would be to run what stands there
        raise CheckpointError(f"{name} holds something else than tensors and plain data{at}") from None
    except Exception as error:  # whatever a damaged file makes of itself
        raise CheckpointError(f"{name} is damaged{at}: {str(error)[:200]}") from None


def read_metadata(folder: Path) -> Metadata:
    """The description of all tensors in a folder.

    Raises:
        CheckpointError: if it is damaged, or holds anything else.
    """
    try:
        with (folder / METADATA).open("rb") as file:
            found = _Unpickler(file).load()
    except (CheckpointError, OSError) as error:
        raise CheckpointError(f"{folder / METADATA} cannot be read: {error}") from None
    except Exception as error:  # whatever a damaged pickle makes of itself
        raise CheckpointError(f"{folder / METADATA} is damaged: {error}") from None
    if not isinstance(found, Metadata):
        raise CheckpointError(f"{folder / METADATA} is damaged: it holds a {type(found).__name__}")
    return found


def described(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """The tensors by their keys."""
    return {key: of for key, of in metadata.state_dict_metadata.items() if isinstance(of, TensorStorageMetadata)}
