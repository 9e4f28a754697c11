"""Roots in the background: the same bits whatever the threads do, and every way out of a run."""

from __future__ import annotations

import gc
import io
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ds_shampoo import Shampoo
from ds_shampoo.algorithm.inverse_roots import InverseRoot, inverse_root
from ds_shampoo.roots import jobs
from ds_shampoo.roots.pool import WorkerError

SETTINGS: dict[str, Any] = {"lr": 0.01, "block_size": 16, "root_interval": 6, "root_delay": 3}
STEPS = 25


def build(**changed: Any) -> tuple[list[nn.Parameter], Shampoo]:
    shapes = [(40, 24), (24, 24), (7,), (16, 3, 3)]
    params = [
        nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(i))) for i, shape in enumerate(shapes)
    ]
    return params, Shampoo(params, **{**SETTINGS, **changed})


def train(params: list[nn.Parameter], optimizer: Shampoo, steps: range) -> None:
    for step in steps:
        for i, param in enumerate(params):
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(1000 * step + i))
        optimizer.step()


def same(a: list[nn.Parameter], b: list[nn.Parameter]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def reference() -> list[nn.Parameter]:
    """The run whose roots are computed within the step and put in force as late as those of the threads."""
    params, optimizer = build(root_overlap=False)
    train(params, optimizer, range(STEPS))
    assert optimizer.metrics()["preconditioned_blocks"] > 0
    return params


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("refresh", [0.0, 0.5])
def test_the_same_bits_on_any_number_of_threads(threads: int, refresh: float) -> None:
    settings = {"root_refresh_threshold": refresh, "statistics_beta": 0.95}
    inline, optimizer = build(root_overlap=False, **settings)
    train(inline, optimizer, range(STEPS))
    threaded, overlapped = build(root_threads=threads, **settings)
    train(threaded, overlapped, range(STEPS))
    assert same(inline, threaded)
    assert (overlapped.metrics()["roots_skipped"] > 0) == (refresh > 0)
    assert overlapped.metrics()["root_updates"] == optimizer.metrics()["root_updates"] > 0


def test_the_same_bits_when_every_root_is_late(monkeypatch: pytest.MonkeyPatch, reference: list[nn.Parameter]) -> None:
    def slow(*arguments: Any) -> InverseRoot:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.005)
        return inverse_root(*arguments)

    monkeypatch.setattr(jobs, "inverse_root", slow)
    params, optimizer = build(root_threads=1)
    train(params, optimizer, range(STEPS))
    assert same(params, reference)
    assert optimizer.metrics()["root_waits"] > 0
    assert optimizer.metrics()["root_wait_ms"] > 0


def test_the_delay_changes_the_run(reference: list[nn.Parameter]) -> None:
    params, optimizer = build(root_delay=4)
    train(params, optimizer, range(STEPS))
    assert not same(params, reference)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("fate", ["dies", "hangs"])
def test_a_lost_worker_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reference: list[nn.Parameter], fate: str
) -> None:
    calls, gate, others = iter(range(10**6)), threading.Event(), threading.enumerate()

    def mishap(*arguments: Any) -> InverseRoot:
        if threading.current_thread() not in others and next(calls) in (3, 20):
            if fate == "dies":
                raise SystemExit
            gate.wait()
        return inverse_root(*arguments)

    monkeypatch.setattr(jobs, "inverse_root", mishap)
    params, optimizer = build(root_threads=1, root_timeout=60 if fate == "dies" else 2)
    train(params, optimizer, range(STEPS))
    gate.set()
    assert same(params, reference)
    assert optimizer.metrics()["roots_failed"] == 2
    assert "block param_" in caplog.text
    assert "its root thread died or hung; it is solved in the step" in caplog.text


def test_a_root_that_failed_once_is_solved_in_the_step(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reference: list[nn.Parameter]
) -> None:
    calls, others = iter(range(10**6)), threading.enumerate()

    def short_of_memory(*arguments: Any) -> InverseRoot:
        if threading.current_thread() not in others and next(calls) in (3, 20):
            raise MemoryError("no room")
        return inverse_root(*arguments)

    monkeypatch.setattr(jobs, "inverse_root", short_of_memory)
    params, optimizer = build(root_threads=1)
    train(params, optimizer, range(STEPS))
    assert same(params, reference)
    assert optimizer.metrics()["roots_failed"] == 2
    assert "MemoryError in its root thread (no room); it is solved in the step" in caplog.text


def test_without_any_thread_the_bits_are_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reference: list[nn.Parameter]
) -> None:
    def refused(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    params, optimizer = build()
    train(params, optimizer, range(STEPS))
    assert same(params, reference)
    assert optimizer.metrics()["roots_failed"] == optimizer.metrics()["root_updates"] > 0
    assert "can't start new thread" in caplog.text


@pytest.mark.parametrize("steps", [3, STEPS])
def test_threads_end_with_the_optimizer_that_is_dropped(steps: int) -> None:
    before = set(threading.enumerate())
    params, optimizer = build(root_threads=2)
    train(params, optimizer, range(steps))
    threads = set(threading.enumerate()) - before
    assert len(threads) == 2
    del optimizer
    gc.collect()
    assert not any(thread.is_alive() for thread in threads)


def test_an_exception_in_a_worker_stops_training_with_the_blocks_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> InverseRoot:
        raise MemoryError("no room")

    monkeypatch.setattr(jobs, "inverse_root", fails)
    params, optimizer = build()
    with pytest.raises(WorkerError, match=r"block param_\d\[\d\]: MemoryError: no room"):
        train(params, optimizer, range(STEPS))


def test_a_root_of_nan_keeps_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    params, optimizer = build()
    train(params, optimizer, range(STEPS))
    before = optimizer.metrics()["roots_rejected"]
    monkeypatch.setattr(
        jobs, "inverse_root", lambda matrix, *rest: inverse_root(torch.full_like(matrix, torch.nan), *rest)
    )
    train(params, optimizer, range(STEPS, STEPS + 12))
    metrics = optimizer.metrics()
    assert metrics["roots_rejected"] > before
    assert metrics["preconditioned_blocks"] == metrics["owned_blocks"]
    assert all(torch.isfinite(param).all() for param in params)


@pytest.mark.parametrize("at", [5, 8, 11])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_checkpoint_with_jobs_under_way_resumes_to_the_same_bits(
    reference: list[nn.Parameter], at: int, threads: int
) -> None:
    params, optimizer = build()
    train(params, optimizer, range(at))
    file = io.BytesIO()
    torch.save({"params": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    entries = saved["optimizer"]["state"].values()
    assert any(block["pending"]["due_at"] for entry in entries for block in entry.get("blocks", {}).values())
    again, resumed = build(root_threads=threads)
    with torch.no_grad():
        for param, value in zip(again, saved["params"], strict=True):
            param.copy_(value)
    resumed.load_state_dict(saved["optimizer"])
    train(again, resumed, range(at, STEPS))
    assert same(again, reference)


def test_host_memory_is_bounded_and_used_again() -> None:
    params, optimizer = build()
    train(params, optimizer, range(12))
    early = optimizer.metrics()["snapshot_bytes"]
    train(params, optimizer, range(12, 120))
    assert 0 < optimizer.metrics()["snapshot_bytes"] <= 1.5 * early


PROGRAM = """
import importlib.util, os, signal, sys, threading, time
import torch
from torch import nn
from ds_shampoo import Shampoo
from ds_shampoo.algorithm.inverse_roots import inverse_root
from ds_shampoo.roots import jobs

def slow(*arguments):
    time.sleep(0.3)
    return inverse_root(*arguments)

def main():
    jobs.inverse_root = slow
    param = nn.Parameter(torch.randn(64, 64))
    optimizer = Shampoo([param], lr=0.01, block_size=16, root_interval=10, root_threads=2)
    param.grad = torch.randn(64, 64)
    optimizer.step()  # which begins roots of all blocks; the next step would wait for them
    assert sum(thread.name == "ds_shampoo-root" for thread in threading.enumerate()) == 2
    print("jobs under way", flush=True)
    {end}

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("pass", 0),
        ("sys.exit(3)", 3),
        (
            "jobs.inverse_root = inverse_root\n"
            "    large = nn.Parameter(torch.randn(3072, 2))\n"
            "    late = Shampoo([large], lr=0.01, block_size=3072, root_interval=10, root_threads=1)\n"
            "    large.grad = torch.randn(3072, 2); late.step(); time.sleep(0.3); sys.exit(4)",
            4,
        ),
        ("raise RuntimeError('training failed')", 1),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)", -signal.SIGTERM),
        ("signal.signal(signal.SIGTERM, lambda *_: sys.exit(5)); os.kill(os.getpid(), signal.SIGTERM)", 5),
        (
            # torch's exit handler imports tabulate where that is installed. The named tuples that are made then would
            # let CPython forget that it was an interrupt that ended the program, and exit with 1.
            "importlib.util.find_spec('tabulate') and importlib.import_module('tabulate')\n"
            "    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's is ignored\n"
            "    os.kill(os.getpid(), signal.SIGINT); time.sleep(60)",
            -signal.SIGINT,
        ),
        ("os._exit(7)", 7),
        (
            "from torch.utils.data import DataLoader\n"
            "    for context in ('fork', 'spawn'):\n"
            "        loader = DataLoader(range(8), num_workers=2, multiprocessing_context=context)\n"
            "        assert sorted(int(i) for i in loader) == list(range(8))\n"
            "        param.grad = torch.randn(64, 64); optimizer.step()",
            0,
        ),
    ],
    ids=["end", "exit", "large root", "exception", "sigterm", "handled-sigterm", "sigint", "_exit", "dataloaders"],
)
def test_every_way_out_ends_the_process(tmp_path: Path, end: str, code: int) -> None:
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM).replace("{end}", end))
    done = subprocess.run(
        [sys.executable, program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )  # fmt: skip
    assert "jobs under way" in done.stdout
    assert done.returncode == code, done.stdout
    assert "Fatal Python error" not in done.stdout
    assert "terminate called" not in done.stdout
