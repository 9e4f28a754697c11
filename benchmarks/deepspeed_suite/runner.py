"""Runs DeepSpeed's tests in processes of their own, some at a time, and goes on after one that hangs or dies."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any

from benchmarks.deepspeed_suite import plugin
from benchmarks.deepspeed_suite.outcome import Record, merge

ROOT = Path(__file__).resolve().parents[2]
# So many tests share a pytest process, whose start costs as much as a few of them.
BATCH = 40
# Once a rank has raised, the others end soon, or wait for it for ever.
GRACE_S = 20.0
_PAUSE_S = 0.5
_TAIL = 3000


class RunError(RuntimeError):
    """pytest itself failed; the message ends with what it printed."""


@dataclass(frozen=True)
class Runner:
    """How tests are run.

    Attributes:
        tests: the copy of DeepSpeed's folder of tests.
        folder: where logs and notes go.
        ranks: as many as the machine is said to have devices; tests that want more skip themselves.
        timeout: seconds that a test may take.
    """

    tests: Path
    folder: Path
    ranks: int = 2
    timeout: float = 180.0
    _over: Event = field(default_factory=Event, init=False)

    def collect(self, files: Sequence[str], keyword: str | None) -> tuple[list[str], dict[str, str]]:
        """The ids of the tests in some files or folders, and why those of some files can't be had.

        Raises:
            RunError: if pytest fails otherwise.
        """
        found, log = self.folder / "collected.json", self.folder / "collect.log"
        found.unlink(missing_ok=True)
        select = ["-k", keyword] if keyword else []
        arguments = ["--collect-only", "--continue-on-collection-errors", "-q", *select, *files]
        with log.open("w") as output:
            process = self._start(arguments, {plugin.COLLECTED: str(found)}, output)
            try:
                process.wait()
            finally:
                _kill(process)
        if not found.exists():
            raise RunError(f"pytest could not collect {' '.join(files)}:\n{_tail(log)}")
        collected = json.loads(found.read_text())
        return collected["tests"], collected["errors"]

    def run(self, tests: Sequence[str], jobs: int, done: Callable[[Record], None], optimizer: str = "shampoo") -> None:
        """Runs tests, file by file, and hands each one's record over as soon as it has ended.

        Args:
            jobs: how many pytest processes run side by side.
            optimizer: "shampoo" in Adam's place, or "adam" itself.

        An interrupt ends the tests under way, which have no record then.

        Raises:
            RunError: if pytest fails before a batch's first test.
        """
        self._over.clear()
        places: SimpleQueue[int] = SimpleQueue()
        for place in range(jobs):
            places.put(place)
        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(self._run_batch, places, batch, done, optimizer) for batch in _batches(tests)]
            try:
                for future in futures:
                    future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                self._over.set()

    def _run_batch(
        self, places: SimpleQueue[int], tests: Sequence[str], done: Callable[[Record], None], optimizer: str
    ) -> None:
        left, place = list(tests), places.get()
        try:
            while left and not self._over.is_set():
                ended = self._run_process(place, left, done, optimizer)
                left = [test for test in left if test not in ended]
        finally:
            places.put(place)

    def _run_process(
        self, place: int, tests: Sequence[str], done: Callable[[Record], None], optimizer: str
    ) -> set[str]:
        """Runs tests in one process until it ends, or one of them has to be ended; returns which are through."""
        notes, ids, log = (self.folder / f"job-{place}.{kind}" for kind in ("jsonl", "txt", "log"))
        notes.write_text("")
        ids.write_text("".join(f"{test}\n" for test in tests))
        environment = {
            plugin.NOTES: str(notes),
            plugin.OPTIMIZER: optimizer,
            # By it DeepSpeed's tests choose their ports, after which its ranks name the memory that they share.
            "PYTEST_XDIST_WORKER": f"gw{place + 1}",
        }
        with log.open("w") as output:
            process = self._start([f"@{ids}"], environment, output)
            watch = _Watch(notes, done)
            try:
                while process.poll() is None:
                    if self._over.wait(_PAUSE_S):
                        return set(tests)
                    watch.look()
                    overdue = watch.overdue(self.timeout)
                    if overdue:
                        _kill(process)
                        watch.look()
                        watch.end(overdue, f"ended after {watch.seconds:.0f} s")
                        break
            finally:
                _kill(process)
                self._remove_locks()
        watch.look()
        if watch.current:
            watch.end("died", f"pytest's exit code: {process.returncode}\n{_tail(log)}")
        if not watch.ended:
            raise RunError(f"pytest ran none of {len(tests)} tests, {tests[0]} the first:\n{_tail(log)}")
        return watch.ended

    def _start(self, arguments: Sequence[str], environment: Mapping[str, str], output: Any) -> subprocess.Popen[bytes]:
        """Starts pytest as the first of a process group, in the folder of tests."""
        path = [str(ROOT), str(self.tests), *filter(None, [os.environ.get("PYTHONPATH")])]
        inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        return subprocess.Popen(
            [sys.executable, "-m", "pytest", "-p", plugin.__name__, "-p", "no:cacheprovider", *arguments],
            cwd=self.tests,
            env={
                "DS_ACCELERATOR": "cpu",
                "OMP_NUM_THREADS": "1",
                **inherited,
                **environment,
                "LOCAL_SIZE": str(self.ranks),
                # A test that hangs is ended from here, where the others' records are safe.
                "DS_UNITTEST_TIMEOUT": str(int(self.timeout) + 60),
                "PYTHONPATH": os.pathsep.join(path),
            },
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _remove_locks(self) -> None:
        """A process that is killed while it loads one of DeepSpeed's ops leaves a lock for which others wait."""
        ops = os.environ.get("TORCH_EXTENSIONS_DIR", "/tmp/torch_extensions")
        subprocess.run([sys.executable, ROOT / "launch" / "leftovers.py", ops], check=False)


class _Watch:
    """Reads the notes of a process while it runs."""

    def __init__(self, notes: Path, done: Callable[[Record], None]) -> None:
        self.notes, self._done = notes, done
        self._read = 0
        self._seen: dict[str, list[dict[str, Any]]] = {}
        self._begun = self._raised = 0.0
        self.current = ""
        self.ended: set[str] = set()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun

    def look(self) -> None:
        """Takes in what was noted since the last look."""
        with self.notes.open() as file:
            file.seek(self._read)
            for line in iter(file.readline, ""):
                if not line.endswith("\n"):
                    break
                self._read += len(line.encode())
                self._take(json.loads(line))

    def _take(self, note: dict[str, Any]) -> None:
        test, event = note["test"], note["event"]
        self._seen.setdefault(test, []).append(note)
        if event == "begun":
            self.current, self._begun, self._raised = test, time.monotonic(), 0.0
        elif event == "raised" and not self._raised:
            self._raised = time.monotonic()
        elif event == "ended":
            self.current = ""
            self.ended.add(test)
            for record in merge(self._seen.pop(test)):
                self._done(record)

    def overdue(self, timeout: float) -> str:
        """How a test under way is to be ended; empty if it is not to be."""
        if self.current and self._raised and time.monotonic() - self._raised > GRACE_S:
            return "failed"
        return "timed out" if self.current and self.seconds > timeout else ""

    def end(self, outcome: str, text: str) -> None:
        if self.current:
            seconds = round(self.seconds, 1)
            self._take({"test": self.current, "event": "ended", "outcome": outcome, "text": text, "seconds": seconds})


def _batches(tests: Sequence[str]) -> Iterator[list[str]]:
    """Tests of one file each, in the order they came in, at most BATCH of them."""
    batch: list[str] = []
    for test in tests:
        if batch and (len(batch) == BATCH or test.split("::")[0] != batch[0].split("::")[0]):
            yield batch
            batch = []
        batch.append(test)
    if batch:
        yield batch


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and those it has started, which are of its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _plain(text: str) -> str:
    """Text without the colours that DeepSpeed's conftest sets."""
    return "".join(part[part.find("m") + 1 :] if number else part for number, part in enumerate(text.split("\x1b[")))


def _tail(log: Path) -> str:
    return _plain(log.read_text(errors="replace"))[-_TAIL:]
