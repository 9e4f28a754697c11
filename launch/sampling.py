"""Which samples a step trains on, drawn from seed and step alone; which batches each rank validates on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Draw(NamedTuple):
    """A micro-batch's samples.

    Attributes:
        places: int64 [n], where each lies in the training set.
        keys: what seeds anything random about each (masks, crops): seed, step and the sample's number in the step.
    """

    places: npt.NDArray[np.int64]
    keys: list[tuple[int, int, int]]


def draw(size: int, *, seed: int, step: int, part: int, parts: int, samples: int) -> Draw:
    """One micro-batch of a step, out of `size` samples with replacement.

    The step's samples are drawn together and dealt out in parts, one per rank and micro-step. So a resumed run goes
    on as if it had never stopped, and a step's samples are the same however many ranks share them.

    Args:
        part, parts: which of how many micro-batches of this step, over all ranks.
        samples: samples in a micro-batch.
    """
    places = np.random.default_rng((seed, step)).integers(size, size=parts * samples)
    first = part * samples
    return Draw(places[first : first + samples], [(seed, step, first + number) for number in range(samples)])


def dealt(batches: int, rank: int, world_size: int) -> Iterator[tuple[int, bool]]:
    """This rank's share of validation batches: their numbers, and whether each counts.

    Every rank gets equally many, for the sake of collectives in a forward pass; those beyond its share are
    repetitions of the first batch that don't count.
    """
    for first in range(0, batches, world_size):
        mine = first + rank
        yield (mine, True) if mine < batches else (0, False)
