"""Tiny models and real text for them, made without a download."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from examples.text import VOCABULARY, Windows, read

CONTEXT = 16
WIDTH = 32

# Blocks of 24 on dims of 32, 64 and 96: remainders, and borders of ranks that run through them.
SHAMPOO = {"block_size": 24, "root_interval": 2, "matrix_epsilon": 1e-3}


def deepspeed_json(stage: int, named: bool = True, **settings: Any) -> dict[str, Any]:
    """A DeepSpeed config with "auto" where Hugging Face's trainers fill in.

    Args:
        named: whether it names Shampoo, with these settings and those above.
    """
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        },
        "zero_allow_untested_optimizer": True,
    }
    if named:
        params = {"lr": "auto", "weight_decay": "auto", **SHAMPOO, **settings}
        config["optimizer"] = {"type": "Shampoo", "params": params}
    return config


def gpt2(dropout: float = 0.1) -> PreTrainedModel:
    """Made as `from_pretrained` makes it: partitioned from the beginning, where Trainer has a JSON with ZeRO 3."""
    return AutoModelForCausalLM.from_config(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=CONTEXT,
            n_embd=WIDTH,
            n_layer=1,
            n_head=2,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            resid_pdrop=dropout,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def llama(vocabulary: int = VOCABULARY) -> PreTrainedModel:
    """As `gpt2`."""
    return AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=WIDTH,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )


def windows() -> tuple[Windows, Windows]:
    """Enough to train on for a few steps, and sixteen windows to evaluate."""
    text = read(None).encode()
    return Windows(text[: 100 * CONTEXT], CONTEXT), Windows(text[100 * CONTEXT : 116 * CONTEXT], CONTEXT)


def paragraphs() -> tuple[Dataset, Dataset]:
    """The same for TRL, which tokenizes."""
    rows = [{"text": text} for text in read(None).split("\n\n") if len(text) > CONTEXT]
    return Dataset.from_list(rows[:100]), Dataset.from_list(rows[100:116])


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Each byte is a token."""
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<end>"]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
