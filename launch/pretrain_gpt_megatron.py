"""Pretrains Megatron-core's GPT with the optimizer that a DeepSpeed JSON names, over tensor and pipeline ranks.

    python launch/prepare_data.py --output-prefix data/gutenberg_gpt
    deepspeed --num_gpus 4 launch/pretrain_gpt_megatron.py --deepspeed \\
        --deepspeed_config configs/gpt_megatron_shampoo.json \\
        --data-path data/gutenberg_gpt --tensor-model-parallel-size 2 --save runs/gpt_megatron
"""

from __future__ import annotations

import argparse
from typing import Any

from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from ds_shampoo.megatron import GPTPipeline
from megatron_job import Batch, Pipeline, Task, main


def build_model(arguments: argparse.Namespace, config: TransformerConfig, vocabulary: int) -> nn.Module:
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization=arguments.normalization),
        vocabulary,
        arguments.seq_length,
        position_embedding_type=arguments.position_embedding_type,
        share_embeddings_and_output_weights=not arguments.untie_embeddings_and_output_weights,
    )


def build_pipeline(arguments: argparse.Namespace, config: TransformerConfig, vocabulary: int) -> GPTPipeline:
    return GPTPipeline(
        config,
        get_gpt_layer_local_spec(normalization=arguments.normalization),
        vocabulary,
        arguments.seq_length,
        position_embedding_type=arguments.position_embedding_type,
        share_embeddings_and_output_weights=not arguments.untie_embeddings_and_output_weights,
        seed=arguments.seed,
    )


def stage_inputs(batch: Batch) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return (batch["tokens"], batch["position_ids"]), (batch["labels"], batch["loss_mask"])


def dataset_config(arguments: argparse.Namespace, common: dict[str, Any]) -> GPTDatasetConfig:
    return GPTDatasetConfig(
        **common, reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=True
    )


def losses(engine: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    found = engine(batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"])
    return found, batch["loss_mask"]


if __name__ == "__main__":
    main(
        Task(
            "pretrain_gpt_megatron",
            GPTDataset,
            dataset_config,
            build_model,
            losses,
            Pipeline(build_pipeline, stage_inputs),
        ),
        __doc__.splitlines()[0],
    )
