"""What torch has no function for: settings of one thread alone, and an exit that no thread can spoil."""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

logger = logging.getLogger("ds_shampoo")

# cudaStreamCaptureModeRelaxed: this thread may make any call while another one captures a graph.
_RELAXED = 2
_CAPTURE_MODES = (
    ("libc10_cuda.so", "cudaThreadExchangeStreamCaptureMode"),
    ("libc10_hip.so", "hipThreadExchangeStreamCaptureMode"),
)


class _ThreadCounts(NamedTuple):
    """OpenMP's and MKL's functions that hold for the calling thread alone; MKL's are None where torch has none."""

    set_openmp: Callable[[int], Any]
    get_mkl: Callable[[], int] | None
    set_mkl: Callable[[int], Any] | None


@functools.cache
def _thread_counts() -> _ThreadCounts | None:
    """The runtimes that torch itself uses: symbols are looked for in its library and what that depends on."""
    try:
        library = ctypes.CDLL(str(_torch_library("libtorch_cpu.so")))
        set_openmp = library.omp_set_num_threads
    except (OSError, AttributeError):
        return None
    try:
        return _ThreadCounts(set_openmp, library.MKL_Get_Max_Threads, library.MKL_Set_Num_Threads_Local)
    except AttributeError:
        return _ThreadCounts(set_openmp, None, None)


def _torch_library(name: str) -> Path:
    return Path(torch.__file__).parent / "lib" / name


def compute_alone() -> None:
    """Has torch compute on one thread where the calling thread asks it to, and nowhere else.

    `torch.set_num_threads` would do it too, but it also decides for every thread that is started later.
    """
    job_wide = torch.get_num_threads()  # also has torch set up this thread, which would undo what follows
    counts = _thread_counts()
    if counts is None:
        torch.set_num_threads(1)
        _set_for_later_threads(job_wide)
        return
    counts.set_openmp(1)
    if counts.set_mkl is not None:
        counts.set_mkl(1)


def _set_for_later_threads(threads: int) -> None:
    """What threads get that are started later is what was set last; a thread that ends at once sets it."""
    try:
        threading.Thread(target=torch.set_num_threads, args=(threads,), daemon=True).start()
    except RuntimeError:  # no thread can be started, hence none that would notice
        logger.debug("threads that are started from now on compute alone")


@contextmanager
def single_threaded() -> Iterator[None]:
    """Has torch compute on the calling thread alone: eigh on several that share cores is up to 75 times slower."""
    threads, counts = torch.get_num_threads(), _thread_counts()
    set_openmp: Callable[[int], Any] = torch.set_num_threads if counts is None else counts.set_openmp
    set_mkl: Callable[[int], Any] = _nothing
    mkl_threads = 0
    if counts is not None and counts.set_mkl is not None and counts.get_mkl is not None:
        set_mkl, mkl_threads = counts.set_mkl, counts.get_mkl()
    try:
        set_openmp(1)
        set_mkl(1)
        yield
    finally:
        set_openmp(threads)
        set_mkl(mkl_threads)


def _nothing(_: int) -> None:
    return None


def allow_calls_beside_captures() -> None:
    """Lets the calling thread wait for events and pin memory while another one captures a CUDA graph.

    In torch's default mode a capture makes such calls fail on all threads that did not ask for this.
    """
    for library, name in _CAPTURE_MODES:
        path = _torch_library(library)
        if path.exists():
            exchange_capture_mode(path, name)


def exchange_capture_mode(library: Path, name: str) -> None:
    """Calls the runtime's function `name`, found through `library`, for the calling thread."""
    try:
        exchange = getattr(ctypes.CDLL(str(library)), name)
    except (OSError, AttributeError) as error:
        logger.debug("root threads take no part in graph captures' modes: %s", error)
        return
    exchange(ctypes.byref(ctypes.c_int(_RELAXED)))


def leave_threads_behind() -> None:
    """Makes it harmless that threads which are inside torch go on while the process ends.

    While CPython finalises, a thread that comes back from torch is ended by an unwinding that torch's C++ does not let
    through (before Python 3.14, which has such threads wait): the runtime then calls the terminate handler on it, and
    that aborts the process. A handler that sleeps for ever leaves that thread where it is. After the interpreter is
    done the process ends at once, with its exit code, and without running C++ destructors under the thread's feet.
    """
    libc = ctypes.CDLL(None)
    libc.fflush(None)
    if hasattr(libc, "on_exit"):  # glibc's
        libc.on_exit(ctypes.cast(libc._exit, ctypes.c_void_p), None)
    if sys.version_info >= (3, 14):
        return
    for name in ("libstdc++.so.6", "libc++.1.dylib"):
        try:
            set_terminate = ctypes.CDLL(name)._ZSt13set_terminatePFvvE
        except (OSError, AttributeError):
            continue
        set_terminate.argtypes, set_terminate.restype = [ctypes.c_void_p], ctypes.c_void_p
        set_terminate(ctypes.cast(libc.pause, ctypes.c_void_p))
        return
