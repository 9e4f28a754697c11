"""Fused matrices: which ones are known, and that each of their parts is stepped as a parameter of its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ds_shampoo import Shampoo
from ds_shampoo.algorithm import fused
from ds_shampoo.algorithm.blocks import Parts, cut

WIDTH, HEADS, HEAD = 16, 4, 4
SETTINGS = {"lr": 0.02, "block_size": 64, "root_interval": 3, "matrix_epsilon": 1e-3, "root_overlap": False}


class Conv1D(nn.Module):
    """Hugging Face's: a column for each output."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.zeros(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))


class Around(nn.Module):
    """A module with layers, and with attributes that tell their sizes."""

    def __init__(self, layers: dict[str, nn.Module | nn.Parameter], **attributes: Any) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        for name, value in attributes.items():
            setattr(self, name, value)


def linear(outputs: int, inputs: int = WIDTH) -> nn.Linear:
    return nn.Linear(inputs, outputs)


def stack(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def config(**attributes: Any) -> SimpleNamespace:
    return SimpleNamespace(**attributes)


EACH = (WIDTH,) * 3
GROUPED = Parts(0, (16, 8, 8))
BY_HEAD = Parts(0, (HEAD,) * 12)
HALVES = Parts(0, (24, 24))
OF_HEADS = {"num_heads": HEADS, "head_dim": HEAD}
OF_CONFIG = {"head_dim": HEAD, "config": config(num_attention_heads=HEADS, num_key_value_heads=2)}
EXPERT_ROWS = {"gate_up_proj": stack(3, 48, WIDTH), "down_proj": stack(3, WIDTH, 24)}
EXPERT_COLUMNS = {"gate_up_proj": stack(3, WIDTH, 48), "down_proj": stack(3, 24, WIDTH)}


@pytest.mark.parametrize(
    ("layers", "attributes", "expected"),
    [
        ({"c_attn": Conv1D(48, WIDTH)}, OF_HEADS, Parts(1, EACH)),  # GPT-2
        ({"c_attn": Conv1D(32, WIDTH)}, {**OF_HEADS, "is_cross_attention": True}, Parts(1, (16, 16))),
        ({"c_attn": linear(24)}, {**OF_HEADS, "multi_query": True}, Parts(0, (16, 4, 4))),  # GPTBigCode
        ({"c_attn": linear(48)}, {**OF_HEADS, "multi_query": False}, BY_HEAD),
        ({"Wqkv": linear(48)}, {"head_dim": HEAD, "config": config(num_attention_heads=HEADS)}, Parts(0, EACH)),
        ({"Wqkv": linear(48)}, {"n_heads": HEADS, "head_dim": HEAD}, Parts(0, EACH)),  # MPT
        ({"qkv_proj": linear(32)}, OF_CONFIG, GROUPED),  # Phi-3
        ({"qkv_proj": linear(48)}, {"mp_num": 2, **OF_HEADS}, Parts(0, (8,) * 6)),  # CodeGen
        ({"qkv_proj": linear(48)}, {"slope_rate": 0.5, **OF_HEADS}, BY_HEAD),  # MiniMax
        ({"query_key_value": linear(48)}, {"head_size": HEAD, "config": config(num_attention_heads=HEADS)}, BY_HEAD),
        ({"query_key_value": linear(32)}, {**OF_HEADS, "num_kv_heads": 2}, Parts(0, (8, 4, 4) * 2)),  # Falcon
        ({"query_key_value": linear(24)}, {**OF_HEADS, "num_kv_heads": 4}, Parts(0, (16, 4, 4))),
        ({"query_key_value": linear(48)}, {}, None),
        ({"qkv_proj": linear(32)}, {"num_heads": HEADS}, GROUPED),  # groups by a name that nobody knows
        ({"query_key_value": linear(24)}, {"num_heads": HEADS, "multi_query_group_num": 1}, Parts(0, (16, 4, 4))),
        ({"query_key_value": linear(44)}, {"num_heads": HEADS}, None),
        ({"in_proj": linear(48)}, {"all_head_size": 16, "num_attention_heads": 4}, BY_HEAD),  # DeBERTa
        ({"qkv": linear(48)}, {"heads": HEADS}, Parts(0, EACH)),
        ({"qkv": linear(48)}, {}, Parts(0, EACH)),
        ({"qkv": linear(50)}, {}, None),
        ({"qkv": nn.Conv2d(WIDTH, 48, 1)}, {"num_heads": HEADS}, Parts(0, EACH)),
        ({"kv": linear(32)}, {"heads": HEADS}, Parts(0, (16, 16))),
        ({"gate_up_proj": linear(48), "down_proj": linear(WIDTH, 24)}, {}, HALVES),  # Phi-3
        ({"gate_up_proj": linear(48)}, {}, HALVES),
        ({"Wi": linear(48), "Wo": linear(WIDTH, 24)}, {}, HALVES),  # ModernBERT
        ({"Wi": linear(48), "Wo": linear(WIDTH, 48)}, {}, None),
        ({"in_proj": linear(64), "out_proj": linear(WIDTH, 32)}, {}, Parts(0, (32, 32))),  # Mamba
        ({"in_proj": linear(72), "out_proj": linear(WIDTH, 32)}, {}, None),  # Mamba-2
        (EXPERT_ROWS, {"num_experts": 3}, HALVES),  # Mixtral
        (EXPERT_COLUMNS, {"num_experts": 3}, Parts(1, (24, 24))),  # Llama 4
        (EXPERT_COLUMNS, {"num_experts": 3, "is_concatenated": False}, None),  # gpt-oss
        ({"gate_up_proj": stack(3, 48, WIDTH)}, {"num_experts": 3}, None),
        ({"c_fc": linear(48), "c_proj": linear(WIDTH, 48)}, OF_HEADS, None),
    ],
)
def test_what_is_known(layers: dict[str, nn.Module], attributes: dict[str, Any], expected: Parts | None) -> None:
    model = nn.ModuleDict({"layer": Around(layers, **attributes)})
    weight = next(model.parameters())
    assert fused.parts(model).get(id(weight)) == expected
    others = [p for p in model.parameters() if p is not weight]
    assert not any(len(found.lengths) > 1 for p in others if (found := fused.parts(model).get(id(p))) is not None)


def test_torch_s_own_attention() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS)
    assert fused.parts(layer) == {id(layer.self_attn.in_proj_weight): Parts(0, EACH)}
    assert fused.parts(nn.MultiheadAttention(WIDTH, HEADS, kdim=8, vdim=4)) == {}


@pytest.mark.parametrize("transposed", [False, True])
def test_a_lora_factor_s_outputs_divide_as_those_of_its_layer(transposed: bool) -> None:
    base = Conv1D(32, WIDTH) if transposed else linear(32)
    adapted = Around(
        {
            "base_layer": base,
            "lora_A": nn.ModuleDict({"default": nn.Linear(WIDTH, 2, bias=False)}),
            "lora_B": nn.ModuleDict({"default": nn.Linear(2, 32, bias=False)}),
        }
    )
    model = nn.ModuleDict({"attn": Around({"qkv_proj": adapted}, **OF_CONFIG)})
    named = dict(model.named_parameters())
    found = {name: fused.parts(model).get(id(parameter)) for name, parameter in named.items()}
    assert found["attn.qkv_proj.base_layer.weight"] == Parts(int(transposed), GROUPED.lengths)
    assert found["attn.qkv_proj.lora_B.default.weight"] == GROUPED
    assert found["attn.qkv_proj.lora_A.default.weight"] is None
    table = Shampoo([p for n, p in named.items() if "lora" in n], model=model).describe()
    line = next(line for line in table.splitlines() if "lora_B" in line)
    assert "32 x 2 (3 parts)" in line
    assert "1 of 16 x 2, 2 of 8 x 2" in line


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("h.0.attn.c_attn.weight", (16, 48), Parts(1, EACH)),
        ("h.0.attn.c_attn.weight", (48, 16), Parts(0, EACH)),
        ("h.0.attn.c_attn.weight", (32, 16), None),
        ("a.query_key_value.weight", (48, 16), None),
        ("a.gate_up_proj.weight", (48, 16), HALVES),
        ("a.experts.gate_up_proj", (3, 48, 16), None),
        ("a.c_fc.weight", (16, 48), None),
        ("a.c_attn.bias", (48,), None),
    ],
)
def test_what_names_alone_tell(name: str, shape: tuple[int, ...], expected: Parts | None) -> None:
    assert fused.parts_by_name(name, shape) == expected


lengths = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)


@hypothesis_settings(deadline=None)
@given(
    lengths, st.integers(2, 9), st.integers(0, 1), st.integers(1, 8), st.integers(1, 3), st.sampled_from([None, 0, -1])
)
def test_blocks_are_those_of_the_parts(
    lengths: tuple[int, ...], other: int, dim: int, block_size: int, batch: int, skip: int | None
) -> None:
    def shaped(length: int) -> tuple[int, int]:
        return (length, other) if dim == 0 else (other, length)

    whole = shaped(sum(lengths))
    if 1 in whole:
        return
    settings: dict[str, Any] = {"block_size": block_size, "skip_dim": skip}
    stacked = (batch, *whole) if batch > 1 else whole
    found = cut("w", stacked, batch=batch, parts=Parts(dim, lengths), **settings)
    assert found is not None
    hits = torch.zeros(found.shape, dtype=torch.long)
    spans: set[tuple[int, int]] = set()
    for number, block in enumerate(found.blocks):
        assert block.index == number
        assert block.starts == block.origin
        hits[tuple(slice(a, a + n) for a, n in zip(block.starts, block.shape, strict=True))] += 1
        at = block.starts[block.batch_dims :][dim]
        spans.add((at, at + block.matrix_shape[dim]))
    assert bool((hits == 1).all())
    expected: set[tuple[int, int]] = set()
    start = 0
    for length in lengths:
        alone = cut("w", shaped(max(length, 2)), **settings)
        assert alone is not None
        step = length if alone.blocks[0].shape[dim] > block_size else block_size
        expected |= {(start + i, start + min(i + step, length)) for i in range(0, length, step)}
        start += length
    assert spans == expected


def trained(parameters: dict[str, nn.Parameter], parts: Parts, together: bool, settings: dict[str, Any]) -> Tensor:
    """The fused matrix after 20 steps on gradients of parts of very different scales."""
    own = settings if together else {k: v for k, v in settings.items() if k != "fused_parts"}
    optimizer = Shampoo(parameters.items(), **{**SETTINGS, **own})
    dim = parts.dim - 2
    scales = torch.cat([torch.full((n,), 10.0 ** (i % 3)) for i, n in enumerate(parts.lengths)])
    shape = torch.cat(list(parameters.values()), dim).shape
    for step in range(20):
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        grad = grad * (scales if dim == -1 else scales[:, None])
        for parameter, own_grad in zip(
            parameters.values(), [grad] if together else grad.split(parts.lengths, dim), strict=True
        ):
            parameter.grad = own_grad.clone()
        optimizer.step()
    assert optimizer.metrics()["preconditioned_blocks"] > 0
    return torch.cat([p.detach() for p in parameters.values()], dim)


@pytest.mark.parametrize(
    ("shape", "parts", "settings"),
    [
        ((16, 48), Parts(1, EACH), {}),
        ((48, 16), Parts(0, EACH), {}),
        ((16, 48), Parts(1, EACH), {"block_size": 8, "root_interval": 1}),
        ((32, 16), GROUPED, {}),
        ((32, 12), Parts(0, (8, 4, 4) * 2), {"grafting": "none", "lr": 1e-3}),
        ((48, 16), Parts(0, EACH), {"preconditioner": "spectral", "direction_rms": 0.2}),
        ((48, 16), Parts(0, EACH), {"preconditioner": "polar", "direction_rms": 0.2}),
        ((48, 16), Parts(0, EACH), {"momentum": "after", "grafting": "adam_normalized"}),
        ((48, 20), Parts(0, EACH), {"max_preconditioner_dim": 18}),
        ((60, 16), Parts(0, (20,) * 3), {"max_preconditioner_dim": 18}),
        ((120, 2), Parts(0, (40,) * 3), {"max_factor_ratio": 4.0, "root_interval": 1}),
        ((12, 30), Parts(0, (2,) * 6), {"max_factor_ratio": 2.0, "root_interval": 1}),
    ],
    ids=str,
)
def test_parts_step_as_parameters_of_their_own(shape: tuple[int, ...], parts: Parts, settings: dict[str, Any]) -> None:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(99))
    one = {"w": nn.Parameter(start.clone())}
    several = {f"w{i}": nn.Parameter(p.clone()) for i, p in enumerate(start.split(parts.lengths, parts.dim))}
    settings = {**settings, "fused_parts": {"w": list(parts.lengths)}}
    together, apart = (trained(which, parts, which is one, settings) for which in (one, several))
    torch.testing.assert_close(together, apart, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dim", [0, 1])
def test_experts_that_are_fused_twice(dim: int) -> None:
    """Gate and up projection of each of several experts in one tensor."""
    shape = (3, 24, 10) if dim == 0 else (3, 10, 24)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(99))
    one = {"w": nn.Parameter(start.clone())}
    several = {
        f"w{i}": nn.Parameter(half.contiguous().clone()) for i, half in enumerate(start.split(12, dim + 1))
    }  # each a batch
    parts = Parts(dim, (12, 12))
    settings: dict[str, Any] = {"batch_dims": {"w*": 1}, "fused_parts": {"w": [12, 12]}, "root_interval": 1}
    together, apart = (trained(which, parts, which is one, settings) for which in (one, several))
    torch.testing.assert_close(together, apart, rtol=1e-6, atol=1e-7)


def test_taken_for_one_matrix_the_parts_mix() -> None:
    start = torch.randn(48, 16, generator=torch.Generator().manual_seed(99))
    parts = Parts(0, EACH)
    ends = [trained({"w": nn.Parameter(start.clone())}, parts, True, {"fused_parts": {"w": count}}) for count in (1, 3)]
    assert float((ends[0] - ends[1]).norm() / ends[1].norm()) > 0.01


def test_a_checkpoint_of_other_parts_is_refused() -> None:
    weight = nn.Parameter(torch.zeros(48, 16))
    weight.grad = torch.randn(48, 16, generator=torch.Generator().manual_seed(0))
    named = [("qkv.weight", weight)]
    former = Shampoo(named, fused_parts={"qkv.weight": 1}, root_overlap=False)
    former.step()
    present = Shampoo(named, root_overlap=False)
    assert "3 of 16 x 16" in present.describe()
    with pytest.raises(ValueError, match=r'qkv.weight\[0\].* set fused_parts = {"qkv.weight": 1}'):
        present.load_state_dict(former.state_dict())
