"""The index of a folder of blocks: what it may say, and the checksum by which a changed one is known."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

FORMAT = 3
INDEX = "index.json"

# Marks a tensor's place in the tree of numbers that the index keeps of a block.
TENSOR = "$tensor"


class CheckpointError(RuntimeError):
    """A checkpoint that can't be written or taken up; the message names the file, and the block where it is one's."""


def _plain(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
        raise ValueError(f"{name!r} is no file's name without folders")
    return name


def _relative(name: str) -> str:
    parts = PurePosixPath(name).parts
    if not name or PurePosixPath(name).is_absolute() or ".." in parts or "\0" in name or "/".join(parts) != name:
        raise ValueError(f"{name!r} is no path within the checkpoint's folder")
    return name


PlainName = Annotated[str, AfterValidator(_plain)]
RelativeName = Annotated[str, AfterValidator(_relative)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[int, Field(gt=0, lt=2**63)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Stamp = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Dtype = Literal["float32", "bfloat16", "float16", "float64", "int64", "int32", "uint8", "bool"]


class Strict(BaseModel):
    """Takes what it names, of the very types that it names, and nothing else."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class TensorEntry(Strict):
    """A tensor of a block: its key in the file, shape and dtype."""

    key: str = Field(alias="$tensor")
    shape: list[Count]
    dtype: Dtype


class BlockEntry(Strict):
    """A block: its state with entries for its tensors, and the SHA-256 of those tensors' bytes in their order."""

    sha256: Sha256
    state: dict[str, Any]

    @model_validator(mode="after")
    def _check_state(self) -> BlockEntry:
        _once("tensor", (entry.key for entry in tensors_of(self.state)))
        return self


class BlockFile(Strict):
    """A file of blocks."""

    name: PlainName
    blocks: dict[str, BlockEntry]


class ForeignFile(Strict):
    """A file of the framework's own, with what `foreign.digest` found."""

    name: RelativeName
    size: Count
    method: Literal["zip", "whole"]
    sha256: Sha256


class Pointer(Strict):
    """A checkpoint by its tag and, where Shampoo saved it, its stamp."""

    tag: str
    stamp: Stamp | None


class Origin(Strict):
    """Of a universal checkpoint: what it was made from, and what `latest` named at the time."""

    source: Pointer
    latest: Pointer | None


class Header(Strict):
    """What holds for all blocks: the save, the job, how blocks were cut, and each parameter's step count.

    Attributes:
        stamp: one per save, on all of its files.
        scheduled: by param group, the settings that are the checkpoint's and not the JSON's.
    """

    stamp: Stamp
    ds_shampoo: str
    optimizer: str
    global_steps: Count
    world_size: Positive
    tensor_parallel: Positive
    pipeline_stages: Positive
    expert_groups: list[str]
    scheduled: list[dict[str, Any]]
    settings: list[dict[str, Any]]
    cut: list[dict[str, Any]]
    steps: dict[str, Count]


class Index(Strict):
    """The whole of it.

    Attributes:
        files: those in its folder.
        foreign: the framework's, in the folder above.
        universal: only where the framework's files are in universal form.
    """

    format: Literal[3]
    header: Header
    files: list[BlockFile]
    foreign: list[ForeignFile]
    universal: Origin | None
    sha256: Sha256

    @model_validator(mode="after")
    def _check_names(self) -> Index:
        _once("file", (file.name for file in self.files))
        _once("file", (file.name for file in self.foreign))
        _once("block", (block for file in self.files for block in file.blocks))
        return self


def tensors_of(state: Any) -> list[TensorEntry]:
    """The tensor entries in a block's tree, in the tree's order, by which its bytes are hashed.

    Raises:
        ValueError: for an entry that is none.
    """
    if isinstance(state, Mapping):
        if TENSOR in state:
            return [TensorEntry.model_validate(dict(state))]
        return [entry for value in state.values() for entry in tensors_of(value)]
    if isinstance(state, list):
        return [entry for value in state for entry in tensors_of(value)]
    return []


def write_index(
    folder: Path,
    header: Mapping[str, Any],
    files: Iterable[BlockFile],
    foreign: Iterable[ForeignFile] = (),
    *,
    universal: Origin | None = None,
    name: str = INDEX,
) -> None:
    """Writes an index in one move; under the name `INDEX` it makes the files the folder's content.

    Raises:
        CheckpointError: if the index would not be one that can be read.
    """
    content: dict[str, Any] = {
        "format": FORMAT,
        "header": dict(header),
        "files": [file.model_dump(by_alias=True) for file in files],
        "foreign": [file.model_dump() for file in foreign],
        "universal": universal.model_dump() if universal is not None else None,
    }
    content["sha256"] = _checksum(content)
    text = json.dumps(content, indent=1)
    _parsed(folder / name, text.encode())
    replace_text(folder / name, text)


def read_index(path: Path) -> Index:
    """An index, read whole and checked.

    Raises:
        CheckpointError: if it is missing, damaged, of another format, or says what it must not.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    return _parsed(path, content)


def _parsed(path: Path, text: bytes) -> Index:
    try:
        content = json.loads(text.decode(), object_pairs_hook=_without_twins)
        if not isinstance(content, dict):
            raise ValueError(f"it holds {type(content).__name__}, not an object")
        version = content.get("format")
        if type(version) is int and version != FORMAT:
            raise ValueError(
                f"format {version}, and this release reads format {FORMAT} only: load it with the release that "
                f"wrote it, ds-shampoo {content.get('ds_shampoo', 'of an earlier version')}"
            )
        index = Index.model_validate(content)
        if content.pop("sha256") != _checksum(content):
            raise ValueError("damaged: its content is not what its checksum was made of")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "its content"
        raise CheckpointError(f"{path}: damaged: {place}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return index


def _checksum(content: Mapping[str, Any]) -> str:
    """The SHA-256 of what an index says, however it is written."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _once("key", (key for key, _ in pairs))
    return dict(pairs)


def _once(kind: str, names: Iterable[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"the {kind} {twice[0]!r} is there twice")


def replace_text(path: Path, text: str) -> None:
    """Writes a file such that a kill leaves either the former one or this."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text, encoding="utf-8")
    confirm(scratch)
    os.replace(scratch, path)
    confirm(path)


def confirm(path: Path) -> None:
    """Waits until a file's content, and its name in the folder, are on the disk."""
    for target in (path, path.parent):
        handle = os.open(target, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
