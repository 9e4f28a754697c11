"""The process's end, while gloo's threads have yet to drop the tensors of collectives."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ds_shampoo.roots import gloo_threads

# A thread of gloo's that loses its core twice: when it has said that the collective is over, so that it is the last to
# hold the tensor; and when it has looked whether Python is there, and is about to ask for the GIL.
BUSY = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + 1e-9 * t.tv_nsec; }
static void keep_busy(double seconds) {
  char name[16];
  prctl(PR_GET_NAME, name);
  if (!strcmp(name, "pt_gloo_runloop"))
    for (double end = now() + seconds; now() < end;) {}
}
void _ZNSt18condition_variable10notify_allEv(void *waiting) {
  void *library = dlopen("libstdc++.so.6", RTLD_LAZY);
  ((void (*)(void *))dlsym(library, "_ZNSt18condition_variable10notify_allEv"))(waiting);
  keep_busy(0.2);
}
void PyEval_AcquireThread(void *state) {
  keep_busy(1.5);
  ((void (*)(void *))dlsym(RTLD_NEXT, "PyEval_AcquireThread"))(state);
}
"""

PROGRAM = """
import time
import torch
import torch.distributed as dist
{imports}

class Large:  # a program that takes a while to finalise
    def __del__(self, sleep=time.sleep):
        sleep(3)

large = Large()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
held = dist.distributed_c10d._get_default_group()  # as DeepSpeed's engine holds it
dist.all_reduce(torch.ones(1000))
time.sleep(0.5)  # the thread is about to ask for the GIL
dist.destroy_process_group()
"""


def functions_can_be_wrapped() -> bool:
    """Whether this Python's lie in a library. Debian's has one too, and an executable that holds all of it itself."""
    return "libpython" in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None or not functions_can_be_wrapped(),
    reason="needs Linux, a C compiler, and Python in a shared library, where its functions can be wrapped",
)
def test_a_thread_of_gloos_that_comes_late_does_not_abort_the_process(tmp_path: Path) -> None:
    (tmp_path / "busy.c").write_text(BUSY)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "busy.so", tmp_path / "busy.c", "-ldl"], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(tmp_path / "busy.so")}

    def run(imports: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "program.py").write_text(PROGRAM.format(imports=imports))
        command = [sys.executable, str(tmp_path / "program.py")]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    ours = run("import ds_shampoo.roots.crew")
    assert ours.returncode == 0, ours.stderr
    if sys.version_info < (3, 14):
        assert "terminate called" in run("").stderr  # without the wait it aborts: the thread was late indeed


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux shows threads")
def test_idle_threads_are_waited_for_no_longer_than_it_takes_to_see_that() -> None:
    group = dist.ProcessGroupGloo(dist.HashStore(), 0, 1, timedelta(seconds=60))
    group.allreduce([torch.ones(3)]).wait()
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    assert "pt_gloo_runloop\n" in names
    begin = time.monotonic()
    assert gloo_threads.wait_until_idle(begin + 30.0)
    assert time.monotonic() - begin < 15.0
