"""Block states in safetensors files, with an index that says where each block lies and what its file must hash to.

A folder holds `index.json` and the files it names. Files are written under names never used before, and the index,
which is written last and replaces its predecessor in one move, decides which of them count: a kill at any moment
leaves the former state of the folder readable.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = 2
INDEX = "index.json"

# Where a checkpoint has its blocks, beside the framework's own files.
FOLDER = "shampoo"

# Marks a tensor's place in the tree of numbers that the index keeps of a block.
_TENSOR = "$tensor"


class CheckpointError(RuntimeError):
    """A checkpoint that can't be taken up; the message names the file, and the block where it is one block's."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of the folder, as the index records it.

    Attributes:
        name: the file's.
        sha256: of its content.
        blocks: by block name, the block's state with every tensor replaced by its key, shape and dtype.
    """

    name: str
    sha256: str
    blocks: dict[str, Any]


def write_file(folder: Path, name: str, states: Mapping[str, Mapping[str, Any]]) -> FileEntry:
    """Writes the states of some blocks into one file, and has the disk confirm it.

    Args:
        name: one that the folder's index does not name yet.
        states: by block name, trees of dicts, lists, tensors and numbers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    blocks = {block: _packed(state, block, tensors) for block, state in states.items()}
    path = folder / name
    save_file(tensors, path)
    _confirm(path)
    return FileEntry(name, _sha256(path), blocks)


def write_index(folder: Path, header: Mapping[str, Any], entries: Sequence[FileEntry]) -> None:
    """Makes the entries the folder's content, and removes what they replace."""
    content = {"format": FORMAT, **header, "files": [asdict(entry) for entry in entries]}
    replace_text(folder / INDEX, json.dumps(content, indent=1))
    kept = {INDEX, *(entry.name for entry in entries)}
    for path in folder.iterdir():
        if path.name not in kept:
            path.unlink()


def replace_text(path: Path, text: str) -> None:
    """Writes a file such that a kill leaves either the former one or this."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text)
    _confirm(scratch)
    os.replace(scratch, path)


class BlockReader:
    """Reads the folder that `write_index` completed, block by block."""

    def __init__(self, folder: Path) -> None:
        """Reads the index.

        Raises:
            CheckpointError: if it is missing, damaged, or of a newer format.
        """
        self.folder = folder
        path = folder / INDEX
        try:
            self.header: dict[str, Any] = json.loads(path.read_text())
            files = self.header.pop("files")
            version = self.header.pop("format")
            if version != FORMAT:
                raise CheckpointError(f"{path}: format {version}, but this release reads format {FORMAT} only")
            self._entries = [FileEntry(**entry) for entry in files]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: {type(error).__name__}: {error}") from error
        self._home = {block: entry for entry in self._entries for block in entry.blocks}

    @property
    def blocks(self) -> Collection[str]:
        return self._home.keys()

    def holds(self, block: str, origin: Sequence[int], shape: Sequence[int]) -> bool:
        """Whether a block of this name is there, and is the same piece of its parameter."""
        if block not in self._home:
            return False
        saved = self._home[block].blocks[block]
        return bool(saved["origin"] == list(origin) and saved["shape"] == list(shape))

    def verify(self, blocks: Collection[str]) -> None:
        """Checks the files that hold these blocks.

        Raises:
            CheckpointError: naming the first file that is missing or does not hash to what was written.
        """
        needed = {self._home[block].name: (self._home[block], block) for block in sorted(blocks, reverse=True)}
        for entry, block in needed.values():
            path = self.folder / entry.name
            if not path.is_file():
                raise CheckpointError(f"{path} is missing; it holds block {block}")
            if _sha256(path) != entry.sha256:
                raise CheckpointError(f"{path} is damaged: its checksum is not the index's; it holds block {block}")

    def read(self, block: str) -> dict[str, Any]:
        """A block's state, tensors on the CPU.

        Raises:
            CheckpointError: if the file does not hold what the index says.
        """
        entry = self._home[block]
        try:
            with safe_open(self.folder / entry.name, framework="pt") as file:
                state = _unpacked(entry.blocks[block], file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder / entry.name}, block {block}: {error}") from error
        assert isinstance(state, dict)
        return state


def _packed(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The tree without its tensors, which are put into `tensors` under their paths."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {_TENSOR: path, "shape": list(value.shape), "dtype": str(value.dtype)}
    if isinstance(value, Mapping):
        return {key: _packed(item, f"{path}.{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_packed(item, f"{path}.{number}", tensors) for number, item in enumerate(value)]
    return value


def _unpacked(value: Any, file: Any) -> Any:
    if isinstance(value, dict):
        if _TENSOR in value:
            tensor: Tensor = file.get_tensor(value[_TENSOR])
            if list(tensor.shape) != value["shape"] or str(tensor.dtype) != value["dtype"]:
                raise SafetensorError(f"{value[_TENSOR]} has another shape or dtype than the index says")
            return tensor
        return {key: _unpacked(item, file) for key, item in value.items()}
    if isinstance(value, list):
        return [_unpacked(item, file) for item in value]
    return value


def _confirm(path: Path) -> None:
    """Waits until a file's content, and its name in the folder, are on the disk."""
    for target in (path, path.parent):
        handle = os.open(target, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
