"""The files that name a checkpoint, and the command line over folders that are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_shampoo.cli import main
from ds_shampoo.state.index import CheckpointError
from ds_shampoo.state.latest import named_by


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"\xff\xfe", "not UTF-8"),
        (b"a\0b", "no checkpoint's name"),
        (b"one\ntwo", "no checkpoint's name"),
        (b"gone", "names gone, but there is no folder"),
    ],
)
def test_a_latest_that_names_nothing(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "latest").write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        named_by(tmp_path / "latest")
    with pytest.raises(SystemExit, match=said):
        main(["to-universal", str(tmp_path)])


def test_a_dangling_link_and_a_folder(tmp_path: Path) -> None:
    assert named_by(tmp_path / "latest") is None
    (tmp_path / "latest").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="link to a file that is not there"):
        named_by(tmp_path / "latest")
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").mkdir()
    with pytest.raises(CheckpointError, match="directory"):
        named_by(tmp_path / "latest")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gone"], "there is no such folder"),
        (["."], "has no file latest that names a checkpoint"),
        ([".", "--tag", "gone"], "has no such checkpoint"),
        ([".", "--tag", ""], "has no such checkpoint"),
        ([".", "--tag", ".."], "has no such checkpoint"),
        ([".", "--tag", "tag"], "index.json"),
    ],
)
def test_the_command_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    (tmp_path / "tag" / "shampoo").mkdir(parents=True)
    (tmp_path / "tag" / "shampoo" / "index.json").write_text("null")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=said):
        main(["to-universal", *arguments])
    assert [path.name for path in tmp_path.iterdir()] == ["tag"]


@pytest.mark.parametrize("workers", ["0", "-1", "x"])
def test_workers_are_at_least_one(tmp_path: Path, workers: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["to-universal", str(tmp_path), f"--workers={workers}"])
    assert "--workers" in capsys.readouterr().err
