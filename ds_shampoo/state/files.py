"""Block states in safetensors files, which an index names and whose every byte is checked as it is read.

A folder holds `index.json` and the files it names. Files are written under names never used before, and the index,
which replaces its predecessor in one move, decides which of them count.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ds_shampoo.algorithm.blocks import Block
from ds_shampoo.state.foreign import differs
from ds_shampoo.state.index import (
    FORMAT,
    INDEX,
    TENSOR,
    BlockEntry,
    BlockFile,
    CheckpointError,
    Header,
    TensorEntry,
    confirm,
    read_index,
    tensors_of,
)

__all__ = ["FOLDER", "FORMAT", "INDEX", "BlockReader", "CheckpointError", "file_name", "write_file"]

# Where a checkpoint has its blocks, beside the framework's own files.
FOLDER = "shampoo"

# safetensors' names of dtypes.
_DTYPES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

# A tensor's dtype, shape, begin and end in a file.
Place = tuple[str, list[int], int, int]

# safetensors' own limit of a header.
_LONGEST_HEADER = 100_000_000


def file_name(rank: int, stamp: str) -> str:
    """The name of a rank's file of one save."""
    return f"rank{rank:05d}-{stamp}.safetensors"


def write_file(folder: Path, name: str, states: Mapping[str, Mapping[str, Any]]) -> BlockFile:
    """Writes the states of some blocks into one file, and has the disk confirm it.

    Args:
        name: one that the folder's index does not name yet.
        states: by block name, trees of dicts, lists, tensors and numbers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    trees = {block: _packed(state, block, tensors) for block, state in states.items()}
    path = folder / name
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path)
    path.chmod(mode & 0o777)  # safetensors makes its files readable to their owner alone
    confirm(path)
    blocks = {}
    for block, tree in trees.items():
        digest = hashlib.sha256()
        for entry in tensors_of(tree):
            digest.update(_bytes(tensors[entry.key]))
        blocks[block] = BlockEntry(sha256=digest.hexdigest(), state=tree)
    return BlockFile(name=name, blocks=blocks)


class BlockReader:
    """Reads the folder that `write_index` completed.

    Attributes:
        index: all that it says.
    """

    def __init__(self, folder: Path) -> None:
        """Reads the index.

        Raises:
            CheckpointError: if it is missing, damaged, or of another format.
        """
        self.folder = folder
        self.index = read_index(folder / INDEX)
        self._home = {block: file for file in self.index.files for block in file.blocks}
        self._fetched: dict[str, dict[str, Any]] = {}

    @property
    def header(self) -> Header:
        return self.index.header

    @property
    def blocks(self) -> Collection[str]:
        return self._home.keys()

    def holds(self, block: Block) -> bool:
        """Whether a block of this name is there, is the same piece of its parameter, and has as many factors."""
        name = str(block)
        if name not in self._home:
            return False
        saved = self._home[name].blocks[name].state
        same = saved.get("origin") == list(block.origin) and saved.get("shape") == list(block.shape)
        factors = saved.get("factors")
        return bool(same and not (isinstance(factors, list) and len(factors) != len(block.preconditioned)))

    def fetch(self, blocks: Collection[str]) -> None:
        """Reads these blocks into host memory, where `read` finds them; files that change later change nothing.

        Raises:
            CheckpointError: naming the first file and block that is missing or is not what was written.
        """
        self._each(blocks, keep=True)

    def verify(self, blocks: Collection[str]) -> None:
        """As `fetch`, but nothing is kept."""
        self._each(blocks, keep=False)

    def read(self, block: str) -> dict[str, Any]:
        """The state of a fetched block, tensors on the CPU."""
        return self._fetched[block]

    def verify_foreign(self, part: int = 0, parts: int = 1, weights_alone: bool = False) -> None:
        """Checks the framework's own files.

        Args:
            part: which of `parts` equal shares of them; ranks divide the work.
            weights_alone: pass over those of the optimizer.

        Raises:
            CheckpointError: naming the first that is missing or is not what was written.
        """
        for file in self.index.foreign[part::parts]:
            if weights_alone and file.name.endswith("optim_states.pt"):
                continue
            problem = differs(self.folder.parent, file)
            if problem:
                raise CheckpointError(
                    f"{self.folder.parent / file.name} {problem}: it is damaged, or of another save than the blocks "
                    f"in {FOLDER}/; load another checkpoint"
                )

    def _each(self, blocks: Collection[str], keep: bool) -> None:
        for file in self.index.files:
            wanted = [block for block in file.blocks if block in blocks and block not in self._fetched]
            if not wanted:
                continue
            path, block = self.folder / file.name, wanted[0]
            try:
                if path.resolve().parent != self.folder.resolve():
                    raise OSError("it is a link that leads out of the folder")
                with path.open("rb") as handle:
                    places = _places(handle)
                    for block in wanted:
                        state = _read(handle, places, file.blocks[block])
                        if keep:
                            self._fetched[block] = state
            except FileNotFoundError as error:
                raise CheckpointError(f"{path} is missing; it holds block {block}") from error
            except OSError as error:
                raise CheckpointError(f"{path}: {error.strerror or error}; it holds block {block}") from error
            except Exception as error:  # whatever a damaged header can lead to
                raise CheckpointError(f"{path} is damaged: {error}; it holds block {block}") from error


def _packed(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The tree without its tensors, which are put into `tensors` under their paths."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {TENSOR: path, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, Mapping):
        return {key: _packed(item, f"{path}.{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_packed(item, f"{path}.{number}", tensors) for number, item in enumerate(value)]
    return value


def _bytes(tensor: Tensor) -> memoryview:
    """A contiguous tensor's memory, to be read or written."""
    if tensor.numel() == 0:
        return memoryview(bytearray())
    return tensor.view(-1).view(torch.uint8).numpy().data


def _places(handle: BufferedReader) -> dict[str, Place]:
    """Dtype, shape, begin and end of every tensor that the file's own header names."""
    length = int.from_bytes(handle.read(8), "little")
    if not 2 <= length <= _LONGEST_HEADER:
        raise ValueError("its header's length")
    header = json.loads(handle.read(length).decode())
    begin = 8 + length
    return {
        key: (place["dtype"], place["shape"], *(begin + int(offset) for offset in place["data_offsets"]))
        for key, place in header.items()
        if key != "__metadata__"
    }


def _read(handle: BufferedReader, places: Mapping[str, Place], block: BlockEntry) -> dict[str, Any]:
    """A block's state; what is hashed is the memory that is returned."""
    digest, tensors = hashlib.sha256(), {}
    for entry in tensors_of(block.state):
        dtype, shape, begin, end = places[entry.key]
        expected: torch.dtype = getattr(torch, entry.dtype)
        size = math.prod(entry.shape) * expected.itemsize
        if _DTYPES.get(dtype) != expected or shape != entry.shape or end - begin != size:
            raise ValueError(f"tensor {entry.key} has another shape or dtype than the index says")
        tensor = torch.empty(entry.shape, dtype=expected, device="cpu")
        memory = _bytes(tensor)
        handle.seek(begin)
        if handle.readinto(memory) != len(memory):
            raise ValueError(f"it ends within tensor {entry.key}")
        digest.update(memory)
        tensors[entry.key] = tensor
    if digest.hexdigest() != block.sha256:
        raise ValueError("the block's checksum is not the index's")
    state = _unpacked(block.state, tensors)
    assert isinstance(state, dict)
    return state


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if TENSOR in value:
            return tensors[TensorEntry.model_validate(value).key]
        return {key: _unpacked(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_unpacked(item, tensors) for item in value]
    return value
