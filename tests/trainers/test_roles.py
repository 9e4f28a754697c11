"""What the parameters of Hugging Face's and PEFT's models are taken for, as the installed releases build them."""

from __future__ import annotations

import pytest

from ds_shampoo.algorithm.selection import Role, kinds, roles

transformers = pytest.importorskip("transformers")


def test_models_of_transformers() -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
    config = transformers.GptOssConfig(
        **small, intermediate_size=48, num_key_value_heads=2, head_dim=8, num_local_experts=4
    )
    model = transformers.GptOssForCausalLM(config)
    found = kinds(model)
    assert {name.split(".")[-1] for name, p in model.named_parameters() if found[id(p)].batch == 4} == {
        "gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias",
    }  # fmt: skip
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(**small, state_size=4))
    role = roles(mamba)
    assert {name.split("mixer.")[-1]: role[id(p)].name for name, p in mamba.named_parameters() if p.dim() > 1} == {
        "backbone.embeddings.weight": "EMBEDDING", "A_log": "ELEMENTWISE", "conv1d.weight": "DEPTHWISE",
        "in_proj.weight": "WEIGHT", "x_proj.weight": "WEIGHT", "dt_proj.weight": "WEIGHT", "out_proj.weight": "WEIGHT",
    }  # fmt: skip


def test_models_of_peft() -> None:
    peft = pytest.importorskip("peft")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    for adapter in (
        peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens", "lm_head"]),
        peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    ):
        model = peft.get_peft_model(transformers.LlamaForCausalLM(config), adapter)
        role = roles(model)
        for name, parameter in model.named_parameters():
            expected = Role.EMBEDDING if "embed_tokens" in name else Role.HEAD if "lm_head" in name else Role.WEIGHT
            if expected is Role.WEIGHT and "lora_" in name:
                expected = Role.LORA
            assert parameter.dim() < 2 or role[id(parameter)] is expected, name
