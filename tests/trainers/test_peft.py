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
    """Only the side of the rank has a factor."""
    model = get_peft_model(Attention(), LoraConfig(r=16, target_modules=["q_proj"]))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    table = Shampoo(trained, model=model).describe()
    assert "preconditioned: 2 parameters, 131,072 elements, 2 blocks, 4.0 KiB over all ranks" in table
