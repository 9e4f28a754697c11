"""What root threads set for themselves alone, and what the threads of the job have beside them."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ds_shampoo.roots import native
from ds_shampoo.roots.pool import Task, ThreadPool


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def thread_counts() -> tuple[int, int]:
    """Torch's and MKL's, as they are on the calling thread."""
    found = re.search(r"mkl_get_max_threads\(\) : (\d+)", torch.__config__.parallel_info())
    threads = torch.get_num_threads()
    return threads, int(found[1]) if found else threads


def elsewhere(work: Callable[[], object]) -> object:
    """What a function gives on a thread that is started now."""
    answers: list[object] = []
    thread = threading.Thread(target=lambda: answers.append(work()))
    thread.start()
    thread.join()
    return answers[0]


@pytest.mark.usefixtures("three_threads")
def test_root_threads_compute_alone_and_nobody_else_does() -> None:
    pool = ThreadPool(2, (), 60.0)
    for number in range(4):
        task: Task[object] = Task("root", (number,), thread_counts)
        pool.submit(task)
        pool.settle(task)
        assert task.answer() == (1, 1)
        assert elsewhere(torch.get_num_threads) == 3
    assert thread_counts() == (3, 3)
    pool.close()


@pytest.mark.usefixtures("three_threads")
def test_a_root_in_the_step_leaves_everyone_what_they_had() -> None:
    with native.single_threaded():
        assert thread_counts() == (1, 1)
        assert elsewhere(torch.get_num_threads) == 3
    assert thread_counts() == (3, 3)
    with pytest.raises(KeyError), native.single_threaded():
        raise KeyError
    assert thread_counts() == (3, 3)


@pytest.mark.usefixtures("three_threads")
def test_without_openmps_functions_torchs_own_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_thread_counts", lambda: None)

    def alone() -> int:
        native.compute_alone()
        return torch.get_num_threads()

    assert elsewhere(alone) == 1
    deadline = threading.Event()
    while elsewhere(torch.get_num_threads) != 3:  # a thread of its own sets it for those that come later
        deadline.wait(0.01)
    assert torch.get_num_threads() == 3
    with native.single_threaded():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_capture_mode_is_exchanged_for_the_calling_thread(tmp_path: Path) -> None:
    source, library = tmp_path / "runtime.c", tmp_path / "libc10_cuda.so"
    source.write_text(
        "static __thread int own; int mode(void) { return own; }\n"
        "int cudaThreadExchangeStreamCaptureMode(int *m) { int before = own; own = *m; *m = before; return 0; }\n"
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    mode = ctypes.CDLL(str(library)).mode

    def exchanged() -> int:
        native.exchange_capture_mode(library, "cudaThreadExchangeStreamCaptureMode")
        return int(mode())

    assert elsewhere(exchanged) == 2
    assert mode() == 0
    native.exchange_capture_mode(library, "hipThreadExchangeStreamCaptureMode")  # which this runtime has not
    native.exchange_capture_mode(tmp_path / "missing.so", "mode")
    native.allow_calls_beside_captures()


EXIT = """
import atexit, sys, threading, time
import torch
from ds_shampoo.roots.pool import Task, ThreadPool

order, started = 3072, threading.Event()
matrix = torch.randn(order, order, dtype=torch.float64)
matrix += matrix.mT.clone()

def solve():
    if not started.is_set():
        started.set()
        {work}

pool = ThreadPool(1, (), {timeout})
task = Task("root", (0,), solve)
pool.submit(task)
started.wait()
if {timeout} < 1:
    pool.settle(task)
    assert task.lost
if {dropped}:
    pool._closer.detach()
    del pool
time.sleep(0.2)
print("at work", flush=True)
{end}
"""


@pytest.mark.parametrize(
    ("work", "end", "fate", "code"),
    [
        ("torch.linalg.eigh(matrix)", "pass", "", 0),
        ("torch.linalg.eigh(matrix)", "sys.exit(3)", "", 3),
        ("torch.linalg.eigh(matrix)", "raise RuntimeError('training failed')", "", 1),
        ("torch.linalg.eigh(matrix)", "pass", "dropped", 0),
        ("[torch.linalg.eigh(matrix[:200, :200]) for _ in range(10**9)]", "sys.exit(3)", "", 3),
        ("[matrix[:300, :300] @ matrix[:300, :300] for _ in range(10**9)]", "pass", "", 0),
        ("[torch.linalg.eigh(matrix[:200, :200]) for _ in range(10**9)]", "sys.exit(3)", "hung", 3),
        ("time.sleep(600)", "sys.exit(3)", "", 3),
        ("threading.Lock().acquire() and threading.Event().wait()", "pass", "", 0),
    ],
    ids=["eigh", "exit", "exception", "dropped", "small eighs", "products", "hung eighs", "sleep", "wait"],
)
def test_no_thread_can_spoil_the_exit(tmp_path: Path, work: str, end: str, fate: str, code: int) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        EXIT.format(work=work, end=end, dropped=fate == "dropped", timeout=0.1 if fate == "hung" else 600.0)
    )
    done = subprocess.run(
        [sys.executable, program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False
    )
    assert done.returncode == code, done.stdout
    assert "at work" in done.stdout
    assert "terminate called" not in done.stdout
    assert "Fatal Python error" not in done.stdout
