"""Locks and buffers that killed jobs leave are removed; what is in use never is."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import leftovers
from tests.launch.ranks import ROOT, launch
from tests.launch.test_pretrain import CONFIGS, SMALL

# torch's own lock, held until the process is killed or told to go on.
HOLDER = """
import sys, time
from torch.utils.file_baton import FileBaton
baton = FileBaton(sys.argv[1])
assert baton.try_acquire()
print("held", flush=True)
sys.stdin.read()
baton.release()
"""

WAITER = """
import sys
from pathlib import Path
from torch.utils.file_baton import FileBaton
import leftovers
with leftovers.unlocking(Path(sys.argv[1]).parents[1]):
    baton = FileBaton(sys.argv[1])
    if not baton.try_acquire():
        baton.wait()
print("done")
"""


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    (tmp_path / "some_op").mkdir()
    return tmp_path / "some_op" / "lock"


@pytest.fixture
def holder(lock: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def unlock(folder: Path) -> str:
    """What `make unlock` runs."""
    done = subprocess.run(
        [sys.executable, "-S", ROOT / "launch" / "leftovers.py", folder], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_lock_in_use_stays(lock: Path, holder: subprocess.Popen[str]) -> None:
    assert unlock(lock.parents[1]) == ""
    assert lock.exists()
    holder.communicate("")
    assert holder.returncode == 0
    assert not lock.exists()


def test_a_lock_of_a_killed_process_goes(lock: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert lock.exists()
    assert f"removed {lock}: the process that made it is gone" in unlock(lock.parents[1])
    assert not lock.exists()


def test_who_waits_for_a_process_that_is_killed_goes_on(lock: Path, holder: subprocess.Popen[str]) -> None:
    waiter = subprocess.Popen(
        [sys.executable, "-c", WAITER, lock],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "launch")},
    )
    time.sleep(4)
    assert waiter.poll() is None
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    out, errors = waiter.communicate(timeout=60)
    assert out == "done\n"
    assert f"removed {lock}" in errors


def test_a_lock_that_another_takes_meanwhile_stays(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock.touch()

    pause = time.sleep

    def replaced(seconds: float) -> None:
        lock.unlink()
        pause(0.02)
        lock.touch()

    monkeypatch.setattr(leftovers.time, "sleep", replaced)
    leftovers.remove_stale([lock])
    assert lock.exists()


@pytest.mark.parametrize("kind", ["nfs4", "lustre", "fuse.sshfs"])
def test_a_lock_that_another_machine_may_hold_stays(lock: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    lock.touch()
    monkeypatch.setattr(leftovers, "_PAUSE_S", 0.0)
    monkeypatch.setattr(leftovers, "_file_system", lambda _: kind)
    leftovers.remove_stale([lock])
    assert lock.exists()
    os.utime(lock, (time.time() - 7200, time.time() - 7200))
    leftovers.remove_stale([lock])
    assert not lock.exists()


def test_where_owners_can_not_be_seen_nothing_is_removed(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock.touch()
    monkeypatch.setattr(leftovers.os, "getuid", lambda: 54321)
    leftovers.remove_stale([lock])
    assert lock.exists()


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Path]]:
    """`job(port)`: the path of rank 1's buffer of a job; this process is rank 1 of the one at port 40001."""
    made = []

    def buffer(port: str) -> Path:
        path = leftovers.SHARED_MEMORY / f"deepspeed_allreduce_buffer_{os.getuid()}_test.invalid_{port}_1"
        made.append(path)
        path.write_bytes(b"0")
        return path

    for name, value in {"MASTER_ADDR": "test.invalid", "MASTER_PORT": "40001", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(leftovers, "_PAUSE_S", 0.1)
    yield buffer
    for path in made:
        path.unlink(missing_ok=True)


def test_buffers(job: Callable[[str], Path]) -> None:
    own, used, former = job("40001"), job("40002"), job("40003")
    with used.open():
        leftovers.remove_stale([path for path in leftovers.buffers() if "test.invalid" in path.name])
        assert not former.exists()
        assert own.exists()
        assert used.exists()
    leftovers.remove_own_buffer()
    assert not own.exists()
    assert used.exists()
    leftovers.remove_own_buffer()


@pytest.mark.parametrize("rate", [0.001, "fast"], ids=["to the end", "with an error"])
def test_a_program_leaves_nothing(tmp_path: Path, rate: float | str) -> None:
    config = json.loads((CONFIGS / "gpt_zero2_shampoo.json").read_text())
    config["optimizer"]["params"]["lr"] = rate
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    more = ["--steps", "2", "--save-interval", "0", "--eval-interval", "2"]
    done = launch("deepspeed", "--deepspeed_config", file, "--runs", tmp_path, *SMALL, *more)
    assert (done.returncode == 0) == (rate != "fast"), done.stdout
    assert ("'lr' = 'fast'" in done.stdout) == (rate == "fast")
    (port,) = set(re.findall(r"--master_port=(\d+)", done.stdout))
    assert not list(leftovers.SHARED_MEMORY.glob(f"*_{port}_*"))
