"""Sizes of GPT for jobs on GPUs, as flags of pretrain_gpt_megatron.py: `python launch/megatron_presets.py 6.7b`.

Shapes and, on 64 GPUs, batches are GPT-3's: 2**20 tokens a step for 1.3b, 2**21 for the others. None of them was run by
this project, which had no GPU; tests/megatron_models/test_presets.py builds each without memory and looks at its blocks
and their owners.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """One size, and over how many ranks a layer is sliced.

    Attributes:
        config: DeepSpeed's JSON for it.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    tensor_model_parallel_size: int
    config: str
    seq_length: int = 2048
    train_iters: int = 100_000

    def flags(self) -> list[str]:
        sizes = [
            f"--num-layers {self.num_layers}",
            f"--hidden-size {self.hidden_size}",
            f"--num-attention-heads {self.num_attention_heads}",
            f"--seq-length {self.seq_length}",
            f"--tensor-model-parallel-size {self.tensor_model_parallel_size}",
            f"--train-iters {self.train_iters}",
        ]
        return [*sizes, *(["--sequence-parallel"] if self.tensor_model_parallel_size > 1 else [])]


PRESETS = {
    "1.3b": Preset(24, 2048, 16, 1, "configs/gpt_megatron_1.3b_shampoo.json"),
    "6.7b": Preset(32, 4096, 32, 2, "configs/gpt_megatron_6.7b_shampoo.json"),
    "13b": Preset(40, 5120, 40, 4, "configs/gpt_megatron_13b_shampoo.json"),
}


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] not in PRESETS:
        sys.exit(f"usage: {sys.argv[0]} {'|'.join(PRESETS)}")
    preset = PRESETS[sys.argv[1]]
    print(*preset.flags(), f"--deepspeed_config {preset.config}")


if __name__ == "__main__":
    main()
