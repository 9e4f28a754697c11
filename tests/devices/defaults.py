"""A default dtype or device for the time of a `with` block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def default(which: torch.dtype | str | None) -> Iterator[None]:
    """A default dtype, or a default device, or neither."""
    before = torch.get_default_dtype()
    try:
        if isinstance(which, torch.dtype):
            torch.set_default_dtype(which)
        elif which is not None:
            torch.set_default_device(which)
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
