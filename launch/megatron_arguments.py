"""The command line of the Megatron programs: Megatron's names where it has any, and DeepSpeed's two."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def parse_arguments(description: str) -> argparse.Namespace:
    """The command line, checked as far as it can be without reading anything."""
    parser = argparse.ArgumentParser(description=description)
    model = parser.add_argument_group("model")
    model.add_argument("--num-layers", type=int, default=4, help="transformer layers (default: %(default)s)")
    model.add_argument("--hidden-size", type=int, default=256, help="width of a layer (default: %(default)s)")
    model.add_argument("--ffn-hidden-size", type=int, help="default: 4 times the hidden size")
    model.add_argument("--num-attention-heads", type=int, default=4, help="of a layer (default: %(default)s)")
    model.add_argument("--num-query-groups", type=int, help="default: one per head")
    model.add_argument("--seq-length", type=int, default=128, help="tokens of a sample (default: %(default)s)")
    model.add_argument("--swiglu", action="store_true", help="gated feed-forward layers")
    model.add_argument("--normalization", choices=("LayerNorm", "RMSNorm"), default="LayerNorm")
    model.add_argument("--position-embedding-type", choices=("learned_absolute", "rope"), default="learned_absolute")
    model.add_argument("--disable-bias-linear", action="store_true", help="layers without biases")
    model.add_argument("--untie-embeddings-and-output-weights", action="store_true")
    model.add_argument(
        "--recompute-activations", action="store_true", help="attention's core is computed again in the backward pass"
    )
    parallel = parser.add_argument_group("parallelism")
    parallel.add_argument(
        "--tensor-model-parallel-size",
        type=int,
        default=1,
        help="ranks that a layer is sliced over (default: %(default)s)",
    )
    parallel.add_argument("--sequence-parallel", action="store_true")
    parallel.add_argument(
        "--pipeline-model-parallel-size", type=int, default=1, help="above 1 at ZeRO stage 0 or 1 only"
    )
    data = parser.add_argument_group("data")
    data.add_argument("--data-path", type=Path, required=True, help="prefix that prepare_data.py was given")
    data.add_argument("--tokenizer-model", type=Path, help="default: <data-path>.json")
    data.add_argument("--split", default="95,5,0", help="training, validation, test (default: %(default)s)")
    training = parser.add_argument_group("training")
    training.add_argument("--train-iters", type=int, default=200, help="optimizer steps (default: %(default)s)")
    training.add_argument(
        "--eval-interval", type=int, default=50, help="steps between validations (default: %(default)s)"
    )
    training.add_argument("--eval-iters", type=int, default=10, help="batches of a validation (default: %(default)s)")
    training.add_argument("--save", type=Path, help="folder of the run's checkpoints and metrics.jsonl; resumed from")
    training.add_argument(
        "--save-interval", type=int, default=100, help="steps between checkpoints (default: %(default)s)"
    )
    training.add_argument("--seed", type=int, default=1234, help="of weights and samples (default: %(default)s)")
    training.add_argument("--deepspeed", action="store_true", help="taken for granted")
    training.add_argument("--deepspeed_config", type=Path, required=True)
    training.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    arguments = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start this program with the deepspeed launcher or torchrun")
    for number, divisor in (
        ("hidden_size", "num_attention_heads"),
        ("num_attention_heads", "tensor_model_parallel_size"),
        ("num_attention_heads", "num_query_groups" if arguments.num_query_groups else None),
        ("num_layers", "pipeline_model_parallel_size"),
        ("seq_length", "tensor_model_parallel_size" if arguments.sequence_parallel else None),
    ):
        if divisor and getattr(arguments, number) % getattr(arguments, divisor):
            parser.error(f"{flag(number)} must be divisible by {flag(divisor)} {getattr(arguments, divisor)}")
    arguments.tokenizer_model = arguments.tokenizer_model or arguments.data_path.with_name(
        arguments.data_path.name + ".json"
    )
    return arguments


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")
