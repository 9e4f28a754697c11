"""Sizes of GPT for jobs on GPUs, as flags of pretrain_gpt_megatron.py: `python launch/megatron_presets.py 6.7b`.

Shapes and, on 64 GPUs, batches are GPT-3's up to 13b (Brown et al. 2020, table 2.1): 2**20 tokens a step for 1.3b and
2**21 for 6.7b and 13b. Those of 70b are Llama 2's (Touvron et al. 2023, section 2.2): 2**22 tokens. None of them was
run by this project, which had no GPU; tests/megatron_models/test_presets.py builds each without memory and looks at its
blocks and their owners.

The JSONs in configs/ are what `Preset.settings` gives: `python launch/megatron_presets.py --write` writes them anew.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

# Shampoo's peak rate in parts of AdamW's, for every preset. Steps of the default's have a root mean square of 0.4 then.
# Muon's jobs of such sizes have 0.2 in AdamW's rate (Liu et al., arXiv 2502.16982); on the small models of
# docs/directions.md 1.0 is best.
RATE_OVER_ADAMW = 1.0

LLAMA = (
    *("--swiglu", "--normalization RMSNorm", "--position-embedding-type rope"),
    *("--disable-bias-linear", "--untie-embeddings-and-output-weights"),
    # Without it the attention scores of 80 layers would not fit beside weights and state.
    "--recompute-activations",
)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One size, and over how many ranks a layer is sliced.

    Attributes:
        adamw_lr: AdamW's peak rate in the paper that the shape is from.
        micro_batch: sequences of a rank's forward pass.
        accumulation: micro-batches of a step, on 64 GPUs.
        root_interval: the least for which 8 root threads a GPU are at work for half of the time, by arithmetic: 0.4
            seconds for a root of 1024, and GPUs that do 4e14 operations in a second. docs/large_jobs.md says how to
            find one's own.
        ffn_hidden_size: None for four times the width.
        num_query_groups: None for one a head.
        more: further flags.
    """

    name: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    tensor_model_parallel_size: int
    adamw_lr: float
    micro_batch: int
    accumulation: int
    root_interval: int
    ffn_hidden_size: int | None = None
    num_query_groups: int | None = None
    seq_length: int = 2048
    train_iters: int = 100_000
    more: Sequence[str] = ()

    @property
    def config(self) -> str:
        """DeepSpeed's JSON for it."""
        return f"configs/gpt_megatron_{self.name}_shampoo.json"

    @property
    def lr(self) -> float:
        return float(f"{RATE_OVER_ADAMW * self.adamw_lr:.3g}")

    def flags(self) -> list[str]:
        sizes = [
            f"--num-layers {self.num_layers}",
            f"--hidden-size {self.hidden_size}",
            f"--num-attention-heads {self.num_attention_heads}",
            *([f"--ffn-hidden-size {self.ffn_hidden_size}"] if self.ffn_hidden_size else []),
            *([f"--num-query-groups {self.num_query_groups}"] if self.num_query_groups else []),
            f"--seq-length {self.seq_length}",
            f"--tensor-model-parallel-size {self.tensor_model_parallel_size}",
            f"--train-iters {self.train_iters}",
        ]
        return [*sizes, *(["--sequence-parallel"] if self.tensor_model_parallel_size > 1 else []), *self.more]

    def settings(self) -> dict[str, Any]:
        """What its JSON says."""
        return {
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": 1.0,
            "steps_per_print": 100,
            "bf16": {"enabled": True},
            "optimizer": {
                "type": "Shampoo",
                "params": {
                    "lr": self.lr,
                    "weight_decay": 0.1,
                    "block_size": 1024,
                    "root_interval": self.root_interval,
                    "exchange_dtype": "bfloat16",
                },
            },
            "scheduler": {
                "type": "WarmupCosineLR",
                "params": {
                    "total_num_steps": self.train_iters,
                    "warmup_num_steps": 2000,
                    "warmup_type": "linear",
                    "cos_min_ratio": 0.1,
                },
            },
            "zero_optimization": {"stage": 1, "overlap_comm": True},
        }


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="1.3b",
            num_layers=24,
            hidden_size=2048,
            num_attention_heads=16,
            tensor_model_parallel_size=1,
            adamw_lr=2e-4,
            micro_batch=8,
            accumulation=1,
            root_interval=15,
        ),
        Preset(
            name="6.7b",
            num_layers=32,
            hidden_size=4096,
            num_attention_heads=32,
            tensor_model_parallel_size=2,
            adamw_lr=1.2e-4,
            micro_batch=4,
            accumulation=8,
            root_interval=8,
        ),
        Preset(
            name="13b",
            num_layers=40,
            hidden_size=5120,
            num_attention_heads=40,
            tensor_model_parallel_size=4,
            adamw_lr=1e-4,
            micro_batch=2,
            accumulation=32,
            root_interval=8,
        ),
        Preset(
            name="70b",
            num_layers=80,
            hidden_size=8192,
            num_attention_heads=64,
            tensor_model_parallel_size=8,
            adamw_lr=1.5e-4,
            micro_batch=1,
            accumulation=128,
            root_interval=4,
            ffn_hidden_size=28672,
            num_query_groups=8,
            seq_length=4096,
            more=LLAMA,
        ),
    )
}


def write(folder: Path) -> None:
    """Writes every preset's JSON."""
    for preset in PRESETS.values():
        (folder / Path(preset.config).name).write_text(json.dumps(preset.settings(), indent=2) + "\n")


def main() -> None:
    if sys.argv[1:] == ["--write"]:
        write(CONFIGS)
    elif len(sys.argv) == 2 and sys.argv[1] in PRESETS:
        preset = PRESETS[sys.argv[1]]
        print(*preset.flags(), f"--deepspeed_config {preset.config}")
    else:
        sys.exit(f"usage: {sys.argv[0]} {'|'.join(PRESETS)}|--write")


if __name__ == "__main__":
    main()
