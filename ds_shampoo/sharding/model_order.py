"""Blocks and names of all ranks in the order that they have in the undivided model."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeAlias, TypeVar

from ds_shampoo.algorithm.blocks import Block
from ds_shampoo.sharding.expert_names import ExpertName, expert_name
from ds_shampoo.sharding.gathering import gathered

_Said = TypeVar("_Said")

# Blocks whose boundaries are spread together, by what tells one such round from another.
Rounds: TypeAlias = Mapping[Hashable, Sequence[Block]]


def model_order(names: Iterable[str]) -> list[str]:
    """Distinct names in the order that they have in the undivided model.

    Args:
        names: those of all ranks, each rank's in the order of its part of the model; experts numbered over all ranks.
    """
    distinct = list(dict.fromkeys(names))
    parts = {name: _parts(name) for name in distinct}
    layers: dict[str, int] = {}
    templates: dict[tuple[str, str], int] = {}
    for number, (before, _, after) in enumerate(parts.values()):
        layers.setdefault(before, number)
        templates.setdefault((before, after), number)

    def key(name: str) -> tuple[int, int, int]:
        before, number, after = parts[name]
        return layers[before], number, templates[before, after]

    return sorted(distinct, key=key)


def concatenated_over_ranks(own: Sequence[_Said]) -> list[_Said]:
    """What all ranks of the job say, one after another."""
    return [said for rank in gathered(list(own)) for said in rank]


def names_over_ranks(names: Sequence[str]) -> list[str]:
    """The names of all ranks of the job, from this rank's in the order of its part of the model."""
    return model_order(name for rank in gathered(list(names)) for name in rank)


def union_over_ranks(rounds: Rounds) -> Rounds:
    """The blocks of all ranks of the job, each once, from this rank's in the order of its part of the model.

    Ranks may have different rounds, and take part all the same.
    """
    union: dict[Hashable, dict[str, Block]] = {}
    for rank in gathered(list(rounds.items())):
        for key, blocks in rank:
            union.setdefault(key, {}).update((str(block), block) for block in blocks)
    return {
        key: by_name(found.values(), model_order(block.parameter for block in found.values()))
        for key, found in union.items()
    }


def by_name(blocks: Iterable[Block], names: Sequence[str]) -> list[Block]:
    """Blocks in the order of their parameters' names."""
    order = {name: number for number, name in enumerate(names)}
    return sorted(blocks, key=lambda block: (order[block.parameter], block.index))


def _parts(name: str) -> ExpertName:
    """An expert's name taken apart; any other name whole."""
    return expert_name(name) or ExpertName(name, 0, "")
