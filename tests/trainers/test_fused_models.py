"""The fused matrices of Hugging Face's models are known, as the installed release builds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ds_shampoo import Shampoo
from ds_shampoo.algorithm import fused
from ds_shampoo.algorithm.blocks import Parts

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
GPT2_SIZES = {"vocab_size": 50, "n_embd": 64, "n_layer": 1, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
THIRDS, HALVES, BY_HEAD = Parts(0, (64,) * 3), Parts(0, (96, 96)), Parts(0, (16,) * 12)
EXPERTS = {**SIZES, "num_key_value_heads": 2, "num_local_experts": 3}


def build(name: str, **settings: Any) -> Callable[[], torch.nn.Module]:
    def made() -> torch.nn.Module:
        config = getattr(transformers, f"{name}Config")(**settings)
        model: torch.nn.Module = transformers.AutoModel.from_config(config)
        return model

    return made


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (build("GPT2", **GPT2_SIZES), {"c_attn": Parts(1, (64,) * 3)}),
        (build("GPTBigCode", **GPT2_SIZES), {"c_attn": Parts(0, (64, 16, 16))}),
        (build("GPTBigCode", **GPT2_SIZES, multi_query=False), {"c_attn": BY_HEAD}),
        (build("GPTNeoX", **SIZES), {"query_key_value": BY_HEAD}),
        (build("Bloom", vocab_size=50, hidden_size=64, n_layer=1, n_head=4), {"query_key_value": BY_HEAD}),
        (
            build("Falcon", **SIZES, new_decoder_architecture=True, num_kv_heads=2),
            {"query_key_value": Parts(0, (32, 16, 16) * 2)},
        ),
        (
            build("Falcon", **SIZES, new_decoder_architecture=False, multi_query=True),
            {"query_key_value": Parts(0, (64, 16, 16))},
        ),
        (
            build("Phi3", **SIZES, num_key_value_heads=2),
            {"qkv_proj": Parts(0, (64, 32, 32)), "gate_up_proj": HALVES},
        ),
        (build("ModernBert", **SIZES, cls_token_id=0, sep_token_id=0), {"Wqkv": THIRDS, "Wi": HALVES}),
        (build("Mpt", vocab_size=50, d_model=64, n_heads=4, n_layers=1), {"Wqkv": THIRDS}),
        (build("CodeGen", **GPT2_SIZES, rotary_dim=8), {"qkv_proj": BY_HEAD}),
        (build("Persimmon", **SIZES), {"query_key_value": BY_HEAD}),
        (build("Deberta", **SIZES), {"in_proj": BY_HEAD}),
        (build("Mamba", vocab_size=50, hidden_size=64, num_hidden_layers=1), {"in_proj": Parts(0, (128, 128))}),
        (build("Mixtral", **EXPERTS), {"gate_up_proj": HALVES}),
        (build("GptOss", **EXPERTS, head_dim=16), {}),
        (build("Llama", **SIZES), {}),
        (build("Bert", **SIZES), {}),
        (build("T5", vocab_size=50, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4), {}),
    ],
)
def test_what_is_known(model: Callable[[], torch.nn.Module], expected: dict[str, Parts]) -> None:
    built = model()
    found = fused.parts(built)
    names = {name: found[id(p)] for name, p in built.named_parameters() if id(p) in found}
    several = {name.removesuffix(".weight").split(".")[-1]: p for name, p in names.items() if len(p.lengths) > 1}
    assert several == expected


@pytest.mark.parametrize(
    ("name", "settings", "targets", "expected"),
    [
        ("GPT2", GPT2_SIZES, ["c_attn"], "192 x 4 (3 parts)"),
        ("Phi3", {**SIZES, "num_key_value_heads": 2}, ["qkv_proj", "gate_up_proj"], "128 x 4 (3 parts)"),
    ],
)
def test_adapters_of_fused_layers(name: str, settings: dict[str, Any], targets: list[str], expected: str) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build(name, **settings)(), peft.LoraConfig(r=4, target_modules=targets))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    table = Shampoo(trained, model=model).describe()
    assert expected in table
    assert "none:" not in "".join(line for line in table.splitlines() if "lora" in line)
