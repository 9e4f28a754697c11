"""Pretrains Megatron-core's BERT: masked words and the order of sentences, tensor parallelism included.

    python launch/prepare_data.py --model bert --output-prefix data/gutenberg_bert
    deepspeed --num_gpus 4 launch/pretrain_bert_megatron.py --deepspeed \\
        --deepspeed_config configs/gpt_megatron_shampoo.json \\
        --data-path data/gutenberg_bert --tensor-model-parallel-size 2 --save runs/bert_megatron
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from megatron.core.datasets.bert_dataset import BERTMaskedWordPieceDataset, BERTMaskedWordPieceDatasetConfig
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_job import Batch, Task, main


def build_model(arguments: argparse.Namespace, config: TransformerConfig, vocabulary: int) -> nn.Module:
    return BertModel(
        config,
        2,
        bert_layer_local_spec,
        vocabulary,
        arguments.seq_length,
        position_embedding_type=arguments.position_embedding_type,
        share_embeddings_and_output_weights=not arguments.untie_embeddings_and_output_weights,
    )


def dataset_config(arguments: argparse.Namespace, common: dict[str, Any]) -> BERTMaskedWordPieceDatasetConfig:
    return BERTMaskedWordPieceDatasetConfig(
        **common,
        classification_head=True,
        masking_probability=0.15,
        short_sequence_probability=0.1,
        masking_max_ngram=1,
        masking_do_full_word=True,
        masking_do_permutation=False,
        masking_use_longer_ngrams=False,
        masking_use_geometric_distribution=False,
    )


def losses(engine: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss of every masked token, each with its share of the sentence order's loss added."""
    found, order = engine(batch["text"], batch["padding_mask"], batch["types"], batch["labels"])
    sentences = F.cross_entropy(order.float().view(-1, 2), batch["is_random"].view(-1))
    return found + sentences, batch["loss_mask"].to(torch.float32)


if __name__ == "__main__":
    main(
        Task("pretrain_bert_megatron", BERTMaskedWordPieceDataset, dataset_config, build_model, losses),
        __doc__.splitlines()[0],
    )
