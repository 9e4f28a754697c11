"""What DeepSpeed's ops leave behind on CPUs: 69 MB a rank in shared memory, and the lock of a load that was killed.

`python launch/leftovers.py FOLDER` removes the locks below FOLDER that no process has open any more. It needs the
standard library alone.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

SHARED_MEMORY = Path("/dev/shm")
_BUFFER = "deepspeed_allreduce_buffer"

# A load closes its lock before it removes it, so that a lock which nobody has open is looked at twice, this far apart.
_PAUSE_S = 2.0

# Where a process of another machine may have a file open that no process here has.
_NETWORK = ("nfs", "cifs", "smb", "lustre", "ceph", "gpfs", "beegfs", "gluster", "fuse.", "afs", "pvfs")
_ABANDONED_S = 3600.0


class _Identity(NamedTuple):
    """A file as it was when it was looked at; another one under its name has another."""

    device: int
    inode: int
    changed: int


def extensions_folder() -> Path:
    """Where DeepSpeed has its ops built."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR", "/tmp/torch_extensions"))


@contextlib.contextmanager
def loading_ops() -> Iterator[None]:
    """To be held while ops are loaded: no stale lock is waited for, and this process's buffer goes when it ends."""
    atexit.register(remove_own_buffer)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        remove_stale(buffers())
    with unlocking(extensions_folder()):
        yield


@contextlib.contextmanager
def unlocking(folder: Path) -> Iterator[None]:
    """Removes locks below a folder whose owner is gone, as they turn up."""
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            remove_stale(locks(folder), over)
            over.wait(_PAUSE_S)

    thread = threading.Thread(target=watch, name="stale locks", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def remove_own_buffer() -> None:
    """This rank's own, which every rank of the job has mapped by the time it ends."""
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    name = f"{_BUFFER}_{os.getuid()}_{address}_{port}_{os.environ.get('RANK', '0')}"
    (SHARED_MEMORY / name).unlink(missing_ok=True)


def locks(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/lock"))


def buffers() -> list[Path]:
    """This user's, those of the present job aside: DeepSpeed takes a former one of the same name up again."""
    present = f"{os.environ.get('MASTER_ADDR', '')}_{os.environ.get('MASTER_PORT', '')}_"
    mine = f"{_BUFFER}_{os.getuid()}_"
    return [path for path in sorted(SHARED_MEMORY.glob(f"{mine}*")) if not path.name.startswith(mine + present)]


def remove_stale(paths: Iterable[Path], over: threading.Event | None = None) -> None:
    """Removes files that no process has had open for some seconds, and says so; nothing where that can't be seen.

    Args:
        over: breaks the pause off, with nothing removed.
    """
    before = _stale(paths)
    if not before:
        return
    if over is None:
        time.sleep(_PAUSE_S)
    elif over.wait(_PAUSE_S):
        return
    with _alone():
        for path, identity in _stale(before).items():
            if before[path] == identity == _identity(path):
                path.unlink(missing_ok=True)
                print(f"removed {path}: the process that made it is gone", file=sys.stderr, flush=True)


def _stale(paths: Iterable[Path]) -> dict[Path, _Identity]:
    """Those that no process has open, of files whose owner would be seen."""
    own = {path: identity for path in paths if (identity := _identity(path)) is not None and _would_be_seen(path)}
    used = _open_files() if own else set()
    return {path: identity for path, identity in own.items() if identity[:2] not in used}


def _identity(path: Path) -> _Identity | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return _Identity(found.st_dev, found.st_ino, found.st_ctime_ns)


def _would_be_seen(path: Path) -> bool:
    """Whether a process that has this file open is one of ours, on this machine."""
    with contextlib.suppress(OSError):
        found = path.stat()
        far = _file_system(path).startswith(_NETWORK) and time.time() - found.st_mtime < _ABANDONED_S
        return Path("/proc/self/fd").is_dir() and os.getuid() in (0, found.st_uid) and not far
    return False


def _file_system(path: Path) -> str:
    """The type of the file system that a path is on; empty where this machine does not say."""
    kind, longest, real = "", -1, path.resolve()
    with contextlib.suppress(OSError, IndexError):
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, point, found = line.split(" ")[:3]
            if real.is_relative_to(point.replace("\\040", " ")) and len(point) >= longest:
                kind, longest = found, len(point)
    return kind


def _open_files() -> set[tuple[int, int]]:
    """Device and inode of all files that processes have open, as far as this one may see them."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            for descriptor in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    target = descriptor.stat()
                    found.add((target.st_dev, target.st_ino))
    return found


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One remover at a time: between another's look and its removal a new lock might come under the old name."""
    descriptor = os.open(f"/tmp/ds-shampoo-leftovers-{os.getuid()}", os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    remove_stale(locks(Path(sys.argv[1])))
