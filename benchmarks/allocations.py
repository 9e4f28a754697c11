"""What a call allocates, by the events of torch's own allocators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True, slots=True)
class Allocations:
    """Bytes of tensors.

    Attributes:
        largest: of the largest single allocation.
        peak: the most that was held at once beyond what was held before.
        kept: what is held afterwards beyond that.
    """

    largest: int
    peak: int
    kept: int


def allocations_of(work: Callable[[], object]) -> Allocations:
    """Counts what `work` allocates on this process's CPU while it runs, on all of its threads."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    events = found.profiler.kineto_results.events()  # type: ignore[union-attr]
    ordered = sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns())
    return summarize([event.nbytes() for event in ordered])


def summarize(changes: Sequence[int]) -> Allocations:
    """From the bytes of every allocation, and negative those of every release, in the order they happened."""
    held = peak = 0
    for change in changes:
        held += change
        peak = max(peak, held)
    return Allocations(max([0, *changes]), peak, held)
