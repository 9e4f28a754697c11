"""What a LoRA adapter costs Shampoo, by the names that PEFT gives."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from ds_shampoo import Shampoo


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4096, 4096, bias=False, dtype=torch.bfloat16)


def test_what_lora_costs() -> None:
    """Only the side of the rank has a factor; the gradient that "polar" keeps is as large as the pair."""
    model = get_peft_model(Attention(), LoraConfig(r=16, target_modules=["q_proj"]))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for settings, taken in (({}, "516.0 KiB"), ({"preconditioner": "shampoo"}, "4.0 KiB")):
        table = Shampoo(trained, model=model, **settings).describe()
        assert f"preconditioned: 2 parameters, 131,072 elements, 2 blocks, {taken} over all ranks" in table
