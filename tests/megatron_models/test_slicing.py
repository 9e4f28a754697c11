"""Where Megatron's matrices are cut: every element in one section of one rank, and fused matrices apart."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from ds_shampoo.algorithm.blocks import Section, cut

pytest.importorskip("megatron.core")
from ds_shampoo.frameworks.megatron.slicing import sections

HEAD, GROUPS, QUERIES = 4, 4, 3
HEADS = GROUPS * QUERIES


def sliced(layer: str, shape: tuple[int, int], dim: int, stride: int = 1, **config: object) -> nn.Module:
    """A model whose one layer holds a slice of a matrix as Megatron's layers do."""
    settings = {
        "gated_linear_unit": stride == 2, "kv_channels": HEAD, "num_query_groups": GROUPS,
        "num_attention_heads": HEADS, **config,
    }  # fmt: skip
    module = nn.Linear(1, 1)
    module.weight = nn.Parameter(torch.zeros(shape))
    module.weight.tensor_model_parallel, module.weight.partition_dim = True, dim  # type: ignore[attr-defined]
    module.weight.partition_stride = stride  # type: ignore[attr-defined]
    module.config = SimpleNamespace(**settings)
    return nn.ModuleDict({layer: module})


def of_rank(
    layer: str, whole: tuple[int, int], dim: int, rank: int, size: int, stride: int = 1, groups: int = GROUPS
) -> list[Section]:
    shape = tuple(n // size if i == dim else n for i, n in enumerate(whole))
    model = sliced(layer, shape, dim, stride, num_query_groups=groups)  # type: ignore[arg-type]
    found = sections(model, f"{layer}.weight", model[layer].weight, rank=rank, world_size=size)
    assert found is not None
    return found


# Fewer query groups than ranks at the end: a slice's border falls within a group.
CASES = [
    ("linear_fc1", (48, 6), 0, 1, GROUPS),
    ("linear_fc1", (48, 6), 0, 2, GROUPS),
    ("linear_fc2", (6, 48), 1, 1, GROUPS),
    ("linear_qkv", ((QUERIES + 2) * HEAD * GROUPS, 6), 0, 1, GROUPS),
    ("linear_kv", (2 * HEAD * GROUPS, 6), 0, 1, GROUPS),
    ("output_layer", (40, 6), 0, 1, GROUPS),
    ("linear_qkv", ((HEADS + 2) * HEAD, 6), 0, 1, 1),
    ("linear_qkv", ((HEADS // 2 + 2) * HEAD * 2, 6), 0, 1, 2),
    ("linear_kv", (2 * HEAD, 6), 0, 1, 1),
]


@pytest.mark.parametrize(("layer", "whole", "dim", "stride", "groups"), CASES)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_ranks_together_hold_every_element_once(
    layer: str, whole: tuple[int, int], dim: int, stride: int, groups: int, size: int
) -> None:
    hits = np.zeros(whole, dtype=int)
    for rank in range(size):
        found = of_rank(layer, whole, dim, rank, size, stride, groups)
        assert [(s.origin, s.shape) for s in found] == [
            (s.origin, s.shape) for s in of_rank(layer, whole, dim, 0, size, stride, groups)
        ]
        mine = [s for s in found if s.starts is not None]
        local = np.zeros([n // size if i == dim else n for i, n in enumerate(whole)], dtype=int)
        for section in mine:
            assert section.starts is not None
            hits[tuple(slice(a, a + n) for a, n in zip(section.origin, section.shape, strict=True))] += 1
            local[tuple(slice(a, a + n) for a, n in zip(section.starts, section.shape, strict=True))] += 1
        assert (local == 1).all()
    assert (hits == 1).all()


@pytest.mark.parametrize(("layer", "whole", "dim", "stride", "groups"), CASES)
def test_blocks_are_the_same_at_any_size(
    layer: str, whole: tuple[int, int], dim: int, stride: int, groups: int
) -> None:
    """The same numbers, places and shapes, where the block size divides the slices."""

    def blocks(size: int) -> dict[int, tuple[tuple[int, ...], tuple[int, ...]]]:
        found: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        for rank in range(size):
            shape = [n // size if i == dim else n for i, n in enumerate(whole)]
            blocked = cut("w", shape, block_size=2, sections=of_rank(layer, whole, dim, rank, size, stride, groups))
            assert blocked is not None
            for block in blocked.blocks:
                assert block.index not in found
                found[block.index] = block.origin, block.shape
        return found

    assert blocks(1) == blocks(2) == blocks(4)


def test_gate_and_up_keep_their_places_in_the_whole() -> None:
    found = of_rank("linear_fc1", (16, 3), 0, 1, 2, stride=2)
    assert [(s.origin[0], s.shape[0], s.starts) for s in found] == [
        (0, 4, None), (8, 4, None), (4, 4, (0, 0)), (12, 4, (4, 0)),
    ]  # fmt: skip


def test_queries_keys_and_values_of_each_group_are_apart() -> None:
    found = of_rank("linear_qkv", ((QUERIES + 2) * HEAD * GROUPS, 6), 0, 0, 1)
    assert [s.shape[0] for s in found] == [QUERIES * HEAD, HEAD, HEAD] * GROUPS


def test_a_slice_that_ends_within_a_group_cuts_it_there() -> None:
    found = of_rank("linear_qkv", ((HEADS + 2) * HEAD, 6), 0, 1, 2, groups=1)
    assert [(s.origin[0], s.shape[0], s.starts) for s in found] == [
        (0, 28, None), (28, 20, (0, 0)), (48, 4, (20, 0)), (52, 4, (24, 0)),
    ]  # fmt: skip


def test_rows_that_do_not_fit_are_refused() -> None:
    model = sliced("linear_qkv", (50, 6), 0)
    with pytest.raises(ValueError, match=r"'linear_qkv.weight' of shape \(50, 6\) does not fit"):
        sections(model, "linear_qkv.weight", model["linear_qkv"].weight, rank=0, world_size=1)


def test_what_is_whole_on_every_rank_has_no_sections() -> None:
    model = nn.ModuleDict({"router": nn.Linear(4, 4)})
    router = model["router"].weight
    assert sections(model, "router.weight", router, rank=0, world_size=2) is None


def test_without_megatron_the_message_says_what_to_install() -> None:
    program = "import sys; sys.modules['megatron.core'] = None; import ds_shampoo.megatron"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ds_shampoo.megatron needs megatron-core: pip install 'ds-shampoo[megatron]'" in done.stderr
