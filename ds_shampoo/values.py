"""Values of settings that are more than a number or a word: what they may be, and what they come to."""

from __future__ import annotations

from ds_shampoo.algorithm.preconditioners.defaults import GRAFTING


def parse_cores(cores: object) -> object:
    """A list of cores, also from a string like "0-3,8", as DeepSpeed's `--bind_core_list` takes it; "auto" stays.

    Raises:
        ValueError: for anything else, and for a core that is named twice.
    """
    if cores == "auto":
        return cores
    if isinstance(cores, str):
        cores = [core for part in cores.split(",") for core in _core_run(part.strip())]
    if not isinstance(cores, list) or not cores or not all(type(core) is int and core >= 0 for core in cores):
        raise ValueError('must be "auto", a list of core numbers, or a string like "0-3,8"')
    if len(set(cores)) < len(cores):
        raise ValueError("must not name a core twice")
    return cores


def parse_parts(parts: object) -> object:
    """How a matrix divides that others were fused into: in so many equal parts, or in parts of these lengths.

    Raises:
        ValueError: for anything else.
    """
    lengths = parts if isinstance(parts, list) and parts else [parts]
    if not all(type(length) is int and length > 0 for length in lengths):
        raise ValueError("must be a number of equal parts, or a list of the parts' lengths, each at least 1")
    return parts


def _core_run(text: str) -> list[object]:
    """The cores of "5" or "2-4"; [None] for anything else."""
    first, dash, last = text.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()):
        return [None]
    return [*range(int(first), int(last if dash else first) + 1)] or [None]


def parse_length(rms: object) -> object:
    """How long directions are: as the grafting steps, or of this root mean square; None where that is left open.

    Raises:
        ValueError: for anything else.
    """
    number = isinstance(rms, int | float) and not isinstance(rms, bool) and 1e-10 <= rms <= 1e6
    if rms is not None and rms != GRAFTING and not number:
        raise ValueError(f'must be "{GRAFTING}", or a number from 1e-10 to 1e6')
    return rms
