"""Reads what ``torch.distributed.checkpoint`` wrote, without running anything that may stand in it."""

import pickle
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

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
