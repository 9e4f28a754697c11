"""The checkout of DeepSpeed that a path names: whether it is of the installed release, and a copy of its tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import deepspeed


class CheckoutError(ValueError):
    """A folder that can't be used as the checkout; the message names it and says why."""


def version_of(checkout: Path) -> str:
    """The version that a checkout says it is of.

    Raises:
        CheckoutError: if there are no DeepSpeed tests, or no version.
    """
    for needed in ("version.txt", "tests/conftest.py", "tests/unit/common.py"):
        if not (checkout / needed).is_file():
            raise CheckoutError(f"--checkout {checkout}: has no {needed}, as a checkout of DeepSpeed's repository has")
    return (checkout / "version.txt").read_text().strip()


def installed_version() -> str:
    """The installed DeepSpeed's version, without what a build puts behind it, as in 0.19.8+cpu."""
    return str(deepspeed.__version__).partition("+")[0]


def check_version(checkout: Path, accepted: str | None = None) -> str:
    """Refuses a checkout of another release: its tests may ask for what the installed one does not do.

    Args:
        accepted: another version whose tests are wanted all the same.

    Returns:
        The checkout's version.

    Raises:
        CheckoutError: naming both versions.
    """
    found, installed = version_of(checkout), installed_version()
    if found not in (installed, accepted):
        raise CheckoutError(
            f"--checkout {checkout} is of DeepSpeed {found}, but {installed} is installed: check out the tag "
            f"v{installed}; or pass --accept-version {found}, and see what fails with Adam too"
        )
    return found


def copy_tests(checkout: Path, folder: Path) -> Path:
    """Copies a checkout's tests to where no `deepspeed` stands beside them, and returns where.

    Their conftest puts the folder above them on the path, where ranks would find the checkout's own package.
    """
    tests = folder / "tests"
    if not tests.exists():
        unfinished = folder / "tests.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        leave_out = shutil.ignore_patterns("__pycache__", ".pytest_cache")
        shutil.copytree(checkout / "tests", unfinished, ignore=leave_out, symlinks=True)
        unfinished.rename(tests)
    return tests
