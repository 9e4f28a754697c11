"""What every rank says, on all ranks."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist

_Said = TypeVar("_Said")


def gathered(own: _Said, group: dist.ProcessGroup | None = None) -> list[_Said]:
    """What the ranks of a process group say, in their order; all of them call this at once.

    Args:
        own: this rank's, which can be pickled.
        group: None for all ranks of the job.
    """
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, own, group=group)
    return found
