"""Files of torch's: a change of any byte that is read is seen."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from ds_shampoo.state.foreign import differs, digest


def content() -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    return {"weights": {name: torch.randn(40, generator=generator) for name in "abc"}, "step": 3}


@pytest.mark.parametrize("archive", [True, False])
def test_flipped_bits_are_seen(tmp_path: Path, archive: bool) -> None:
    path = tmp_path / "states.pt"
    torch.save(content(), path, _use_new_zipfile_serialization=archive)
    recorded = digest(tmp_path, path.name)
    assert recorded.method == ("zip" if archive else "whole")
    assert differs(tmp_path, recorded) == ""
    usual = path.read_bytes()
    for at in range(0, len(usual), 3):
        flipped = usual[at] ^ 1 << random.Random(at).randrange(8)
        path.write_bytes(usual[:at] + bytes([flipped]) + usual[at + 1 :])
        assert differs(tmp_path, recorded), at


def test_another_save_of_the_same_size_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "states.pt"
    torch.save(content(), path)
    recorded = digest(tmp_path, path.name)
    other = content()
    other["weights"]["b"][7] += 1  # type: ignore[index]
    torch.save(other, path)
    assert differs(tmp_path, recorded) == "is not the file that was written"
    torch.save(content(), path)
    assert differs(tmp_path, recorded) == ""


def test_missing_and_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "states.pt"
    torch.save(content(), path)
    recorded = digest(tmp_path, path.name)
    path.write_bytes(path.read_bytes()[:-1])
    assert differs(tmp_path, recorded) == "has not the size that it was written with"
    path.unlink()
    assert differs(tmp_path, recorded) == "is missing"


def test_what_is_hashed_at_a_save_is_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The records, which are nearly all of a file, are left to the CRCs that torch makes anyway."""
    from ds_shampoo.state import foreign

    torch.save({"weight": torch.zeros(1_000_000)}, tmp_path / "states.pt")
    hashed = 0
    usual = foreign.hashlib.sha256

    class Counted:
        def __init__(self) -> None:
            self._inner = usual()

        def update(self, chunk: bytes) -> None:
            nonlocal hashed
            hashed += len(chunk)
            self._inner.update(chunk)

        def hexdigest(self) -> str:
            return self._inner.hexdigest()

    monkeypatch.setattr(foreign.hashlib, "sha256", Counted)
    digest(tmp_path, "states.pt")
    assert 0 < hashed < 10_000
