"""Waits, as the process ends, until gloo's threads are done with the tensors of collectives that are over.

A collective returns when its result is there. The thread of gloo that ran it drops the tensors after that, and takes
the GIL for each that Python has an object of. Once CPython finalises (before 3.14), asking for the GIL ends a thread by
an unwinding that torch's C++ does not let through: the process aborts. `destroy_process_group` joins these threads only
where nothing else holds the group, and DeepSpeed's engine does.
"""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

_NAME = "pt_gloo_runloop"  # torch's, of ProcessGroupGloo's threads

# A thread that waits for the GIL wakes once in each switch interval; one without work does not wake.
_INTERVALS = 4


def wait_until_idle(until: float) -> bool:
    """Waits until every one of them sleeps without a wake-up, until this time of `time.monotonic` at most.

    A collective that nobody waited for, and that a peer has not joined yet, looks like no work at all.

    Returns:
        Whether they are idle; True where there are none, and where threads can't be looked at (only Linux shows them).
    """
    before = _wakes()
    while before:
        time.sleep(_INTERVALS * sys.getswitchinterval())  # without the GIL, so that they can have it
        now = _wakes()
        if now == before and None not in now.values():
            return True
        if time.monotonic() >= until:
            return False
        before = now
    return True


def _wakes() -> dict[str, int | None]:
    """How often each of them has gone to sleep, by its number; None for one that does not sleep now."""
    wakes: dict[str, int | None] = {}
    for task in Path("/proc/self/task").glob("*"):
        with contextlib.suppress(OSError):  # it has just ended
            status = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines() if ":\t" in line)
            if status["Name"] == _NAME:
                wakes[task.name] = int(status["voluntary_ctxt_switches"]) if status["State"].startswith("S") else None
    return wakes
