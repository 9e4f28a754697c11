"""One outcome for all ranks: what fails on one is raised on every one of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ds_shampoo.sharding.gathering import gathered
from ds_shampoo.state.index import CheckpointError


@contextlib.contextmanager
def together(own_errors: bool = False) -> Iterator[None]:
    """Runs a block that has no collectives after its first failure, and waits for all ranks at its end.

    Args:
        own_errors: the rank that failed raises its error as it is.

    Raises:
        CheckpointError: on all ranks, if the block raised on any of them; it names the first of those.
    """
    cause: Exception | None = None
    try:
        yield
    except Exception as error:
        cause = error
    problems = gathered("" if cause is None else _told(cause))
    first = next((f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem), None)
    if cause is not None and own_errors:
        raise cause
    if first is not None:
        raise CheckpointError(first) from cause


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
