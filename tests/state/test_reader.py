"""What a folder of blocks says is read exactly as it was written, or refused with a CheckpointError: nothing else."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds_shampoo.algorithm.blocks import Block
from ds_shampoo.state.commit import discard_former
from ds_shampoo.state.files import INDEX, BlockReader, CheckpointError, write_file
from ds_shampoo.state.index import ForeignFile, write_index

STAMP = "0123456789abcdef" * 2
HEADER = {
    "stamp": STAMP,
    "ds_shampoo": "1",
    "optimizer": "DeepSpeedZeroOptimizer",
    "global_steps": 3,
    "world_size": 2,
    "tensor_parallel": 1,
    "pipeline_stages": 1,
    "expert_groups": [],
    "scheduled": [{"lr": 0.1, "initial_lr": 1e-5}],
    "settings": [{"lr": 0.1, "betas": [0.9, 0.95]}],
    "cut": [{"block_size": 24}],
    "steps": {"a.weight": 3, "b.weight": 3},
}


def state_of(number: int) -> dict[str, Any]:
    """A block's state with all that one can have: tensors of several dtypes, none, empty ones, numbers."""
    generator = torch.Generator().manual_seed(number)
    factors = [torch.randn(6, generator=generator), torch.randn(10, generator=generator)]
    return {
        "origin": [0, 24 * number],
        "shape": [3, 4],
        "factors": factors,
        "roots": [torch.randn(3, 3, generator=generator).bfloat16(), torch.randn(4, 4, generator=generator)],
        "rooted": [],
        "ready": number > 0,
        "updates": number,
        "pending": {"due_at": 7, "corrections": [1.25, -1e-30], "snapshots": [factors[0].clone(), torch.empty(0, 2)]},
    }


STATES = {f"{name}.weight[{number}]": state_of(number) for name in "ab" for number in range(2)}


def written(folder: Path) -> Path:
    """A folder of two files with two blocks each."""
    names = sorted(STATES)
    files = [
        write_file(folder, f"rank{rank:05d}-{STAMP}.safetensors", {name: STATES[name] for name in part})
        for rank, part in enumerate((names[:2], names[2:]))
    ]
    foreign = ForeignFile(name="zero/a.weight/fp32.pt", size=3, method="whole", sha256="0" * 64)
    write_index(folder, HEADER, files, [foreign])
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path / "shampoo")


def read_all(folder: Path) -> dict[str, Any]:
    """All that there is to read, in a form that compares."""
    reader = BlockReader(folder)
    reader.fetch(reader.blocks)
    return {"index": reader.index.model_dump(), "states": {name: plain(reader.read(name)) for name in reader.blocks}}


def plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return str(value.dtype), list(value.shape), value.contiguous().view(-1).view(torch.uint8).tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def sealed(index: dict[str, Any]) -> str:
    """An index as text with the checksum that its content asks for."""
    rest = {key: value for key, value in index.items() if key != "sha256"}
    content = json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()
    return json.dumps({**rest, "sha256": hashlib.sha256(content).hexdigest()})


def test_what_was_written_comes_back(folder: Path) -> None:
    assert read_all(folder)["states"] == {name: plain(state) for name, state in STATES.items()}


@pytest.mark.parametrize(
    ("index", "origin", "shape", "preconditioned", "held"),
    [
        (1, (0, 24), (3, 4), (0, 1), True),
        (1, (0, 12), (3, 4), (0, 1), False),
        (1, (0, 24), (4, 3), (0, 1), False),
        (1, (0, 24), (3, 4), (0,), False),  # as a LoRA factor, whose long side had one too
        (2, (0, 48), (3, 4), (0, 1), False),
    ],
)
def test_which_blocks_are_there(
    folder: Path,
    index: int,
    origin: tuple[int, ...],
    shape: tuple[int, ...],
    preconditioned: tuple[int, ...],
    held: bool,
) -> None:
    block = Block("a.weight", index, origin, shape, preconditioned, origin)
    assert BlockReader(folder).holds(block) is held


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = written(tmp_path_factory.mktemp("shared"))
    return folder, read_all(folder)


@pytest.mark.parametrize("name", [INDEX, f"rank00001-{STAMP}.safetensors"])
def test_a_flipped_bit_is_refused_or_changes_nothing(shared: tuple[Path, dict[str, Any]], name: str) -> None:
    folder, expected = shared
    usual = (folder / name).read_bytes()
    bits = [(at, bit) for at in range(len(usual)) for bit in range(8)]
    refused = 0
    for at, bit in random.Random(3).sample(bits, 600):
        (folder / name).write_bytes(usual[:at] + bytes([usual[at] ^ 1 << bit]) + usual[at + 1 :])
        refused += not reads_the_same(folder, expected)
    (folder / name).write_bytes(usual)
    assert reads_the_same(folder, expected)
    assert refused > 400  # of the index, white space may flip


def reads_the_same(folder: Path, expected: dict[str, Any]) -> bool:
    """Whether it is what it was; False if it is refused."""
    try:
        found = read_all(folder)
    except CheckpointError:
        return False
    assert found == expected
    return True


@pytest.mark.parametrize("name", [INDEX, f"rank00000-{STAMP}.safetensors"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_changes_nothing(
    shared: tuple[Path, dict[str, Any]], name: str, data: st.DataObject
) -> None:
    folder, expected = shared
    usual = (folder / name).read_bytes()
    begin = data.draw(st.integers(0, len(usual)))
    end = data.draw(st.integers(begin, min(len(usual), begin + 64)))
    (folder / name).write_bytes(usual[:begin] + data.draw(st.binary(max_size=64)) + usual[end:])
    try:
        reads_the_same(folder, expected)
    finally:
        (folder / name).write_bytes(usual)


REPLACEMENTS = [None, True, -1, 2.5, 2**64, "../x", [None], {"x": 1}]


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of everything in a tree; of long dicts and lists the first two."""
    yield path
    if isinstance(tree, dict):
        for key in tree:
            yield from places(tree[key], (*path, key))
    elif isinstance(tree, list):
        for number in range(min(2, len(tree))):
            yield from places(tree[number], (*path, number))


def changed(tree: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    tree = copy.deepcopy(tree)
    parent = tree
    for step in path[:-1]:
        parent = parent[step]
    change(parent, path[-1])
    return tree


def test_every_key_dropped_or_altered_is_refused_without_a_new_checksum(shared: tuple[Path, dict[str, Any]]) -> None:
    folder, expected = shared
    usual = (folder / INDEX).read_text()
    index = json.loads(usual)
    for path in list(places(index))[1:]:
        for text in variants(index, path):
            (folder / INDEX).write_text(text)
            assert not reads_the_same(folder, expected), (path, text)
    (folder / INDEX).write_text(usual)


def variants(index: dict[str, Any], path: tuple[Any, ...]) -> Iterator[str]:
    yield json.dumps(changed(index, path, lambda parent, key: parent.pop(key)))
    for replacement in REPLACEMENTS:

        def put(parent: Any, key: Any, value: Any = replacement) -> None:
            parent[key] = value

        text = json.dumps(changed(index, path, put))
        if text != json.dumps(index):
            yield text


def test_with_a_new_checksum_nothing_but_a_checkpoint_error_comes_out(shared: tuple[Path, dict[str, Any]]) -> None:
    """Whoever forges a checksum may change numbers; the structure stays what it is, and names stay in the folder."""
    folder, _ = shared
    usual = (folder / INDEX).read_text()
    index = json.loads(usual)
    taken = []
    for path in list(places(index))[1:]:
        for text in variants(index, path):
            (folder / INDEX).write_text(sealed(json.loads(text)))
            try:
                read_all(folder)
            except CheckpointError:
                continue
            taken.append(path)
    (folder / INDEX).write_text(usual)
    free = ("settings", "cut", "steps", "scheduled", "expert_groups", "ds_shampoo", "optimizer", "state")
    others = [path for path in taken if not set(path) & set(free)]
    assert {path[-1] for path in others} <= {
        "sha256", "files", "blocks", "foreign", "universal", "name", "size", 0, 1, "global_steps", "world_size",
        "tensor_parallel", "pipeline_stages", *STATES,
    }, others  # fmt: skip


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", "", ".hidden", "a\0b", "a\nb"])
def test_names_of_files_stay_in_the_folder(folder: Path, name: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["files"][0]["name"] = name
    (folder / INDEX).write_text(sealed(index))
    with pytest.raises(CheckpointError, match=r"files\.0\.name"):
        BlockReader(folder)
    index = json.loads((folder / INDEX).read_text())
    if name not in ("a/b", ".hidden", "a\nb"):
        index["files"][0]["name"], index["foreign"][0]["name"] = "a", name
        (folder / INDEX).write_text(sealed(index))
        with pytest.raises(CheckpointError, match=r"foreign\.0\.name"):
            BlockReader(folder)


def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    file = folder / f"rank00000-{STAMP}.safetensors"
    os.replace(file, tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="link that leads out of the folder"):
        read_all(folder)


@pytest.mark.parametrize("text", ["null", "[]", "3", '"x"', "", "{", "[" * 100000, '{"format": 3}', "\xff"])
def test_an_index_that_is_none(folder: Path, text: str) -> None:
    (folder / INDEX).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=INDEX):
        BlockReader(folder)


def test_another_format_is_named(folder: Path) -> None:
    (folder / INDEX).write_text('{"format": 2, "ds_shampoo": "0.9", "files": []}')
    with pytest.raises(CheckpointError, match=r"format 2, and this release reads format 3 only: .* ds-shampoo 0\.9"):
        BlockReader(folder)


def test_a_key_that_is_there_twice_is_refused(folder: Path) -> None:
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace('"format": 3,', '"format": 3, "format": 3,', 1))
    with pytest.raises(CheckpointError, match="'format' is there twice"):
        BlockReader(folder)


def test_files_replaced_after_they_were_checked_change_nothing(folder: Path) -> None:
    reader = BlockReader(folder)
    reader.fetch(reader.blocks)
    for file in folder.glob("*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-200:] = bytes(200)
        file.write_bytes(bytes(content))
    assert {name: plain(reader.read(name)) for name in reader.blocks} == {n: plain(s) for n, s in STATES.items()}
    with pytest.raises(CheckpointError, match="checksum"):
        BlockReader(folder).fetch(reader.blocks)


def test_others_of_the_group_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    usual = os.umask(0o027)
    try:
        folder = written(tmp_path / "shampoo")
    finally:
        os.umask(usual)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o640}


def test_only_former_files_of_blocks_are_discarded(folder: Path) -> None:
    former = "rank00000-00000000.safetensors"
    kept = ["notes.txt", "rank00000.safetensors", "model.safetensors", "rank00000-copy.safetensors"]
    for name in (former, f"experts-{former}", *kept):
        (folder / name).write_text("x")
    (folder / "folder").mkdir()
    before = {path.name for path in folder.iterdir()}
    discard_former(folder)
    assert before - {path.name for path in folder.iterdir()} == {former, f"experts-{former}"}
    assert read_all(folder)["states"].keys() == STATES.keys()


def test_an_index_that_could_not_be_read_is_not_written(folder: Path) -> None:
    usual = (folder / INDEX).read_bytes()
    with pytest.raises(CheckpointError, match="world_size"):
        write_index(folder, {**HEADER, "world_size": 0}, [])
    assert (folder / INDEX).read_bytes() == usual
