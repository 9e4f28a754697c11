"""What the workers run: real Megatron-core models under the real DeepSpeed engine, on the text of the other tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

import ds_shampoo
from tests.distributed.jobs import CONTEXT, SHAMPOO, batch
from tests.megatron_models import groups

WIDTH, FEED_FORWARD, VOCABULARY = 32, 64, 256

# Divides every slice at tensor-parallel size 1 and 2, or is larger than a section of it.
SETTINGS = {**SHAMPOO, "block_size": 16}


@dataclass
class Run:
    """Mean loss per step; this rank's parameters by name at start and end; the blocks whose roots it has in force."""

    losses: list[float]
    start: dict[str, np.ndarray]
    end: dict[str, np.ndarray]
    metrics: dict[str, float]
    preconditioned: list[str]
    tensor_rank: int
    summed: int


def build(
    tensor_parallel: int,
    kind: str = "gpt",
    sequence_parallel: bool = False,
    gated: bool = False,
    pipeline_parallel: int = 1,
    experts: int | None = None,
    expert_parallel: int = 1,
    tied: bool = False,
    positions: str = "learned_absolute",
    order: str = "tp-cp-ep-dp-pp",
    **more: Any,
) -> nn.Module:
    """A GPT or BERT of two layers with two query groups, or this stage of it; the same weights at any such size.

    The kind "pipeline" is the GPT for DeepSpeed's pipeline engine; `more` goes to Megatron's settings.
    """
    from ds_shampoo.testing import megatron_on_cpu as cpu

    cpu.stand_in()
    from megatron.core import parallel_state
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.bert.bert_model import BertModel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    groups.initialize(
        tensor_model_parallel_size=tensor_parallel,
        pipeline_model_parallel_size=pipeline_parallel,
        expert_model_parallel_size=expert_parallel,
        order=order,
    )
    model_parallel_cuda_manual_seed(0)
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=more.pop("num_layers", 2),
        hidden_size=WIDTH,
        num_attention_heads=4,
        num_query_groups=more.pop("num_query_groups", 2),
        ffn_hidden_size=FEED_FORWARD,
        tensor_model_parallel_size=tensor_parallel,
        pipeline_model_parallel_size=pipeline_parallel,
        pipeline_dtype=torch.float32,
        expert_model_parallel_size=expert_parallel,
        num_moe_experts=experts,
        add_bias_linear=experts is None,
        moe_token_dispatcher_type="allgather",
        moe_router_load_balancing_type="none",
        moe_ffn_hidden_size=FEED_FORWARD if experts else None,
        sequence_parallel=sequence_parallel,
        gated_linear_unit=gated,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        **more,
    )
    if kind == "bert":
        return BertModel(
            config, 2, bert_layer_local_spec, VOCABULARY, CONTEXT, share_embeddings_and_output_weights=True
        )
    spec = get_gpt_layer_local_spec(experts, normalization="LayerNorm")
    if kind == "pipeline":
        from ds_shampoo.frameworks.megatron_deepspeed.pipeline import GPTPipeline

        return GPTPipeline(config, spec, VOCABULARY, CONTEXT, tied, positions)
    return GPTModel(
        config,
        spec,
        VOCABULARY,
        CONTEXT,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=tied,
        position_embedding_type=positions,
    )


@contextmanager
def engine_of(model: nn.Module, config: dict[str, Any]) -> Iterator[Any]:
    import deepspeed

    from ds_shampoo.megatron import mpu

    engine, *_ = ds_shampoo.initialize(model=model, model_parameters=model.parameters(), config=config, mpu=mpu)
    try:
        yield engine
    finally:
        engine.destroy()
        deepspeed.utils.groups.mpu = None  # DeepSpeed would hand it on to the next engine


def loss_of(engine: Any, kind: str, windows: Tensor) -> Tensor:
    tokens, labels = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
    if kind == "bert":
        losses, _ = engine(tokens, torch.ones_like(tokens), torch.zeros_like(tokens), labels)
    else:
        places = torch.arange(CONTEXT).expand_as(tokens)
        ahead = torch.triu(torch.ones(CONTEXT, CONTEXT, dtype=torch.bool), 1)[None, None]
        losses = engine(tokens, places, ahead, labels=labels)
    return losses.mean()


def train(engine: Any, kind: str, first: int, steps: int) -> list[float]:
    from megatron.core import parallel_state

    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    losses = []
    for step in range(first, steps):
        loss = loss_of(engine, kind, batch(step).chunk(ranks)[rank])
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        losses.append(total.item() / torch.distributed.get_world_size())
    return losses


def job(
    config: dict[str, Any],
    steps: int,
    tensor_parallel: int,
    summed: bool = True,
    by_hand: bool = False,
    folder: str = "",
    save_at: int = 0,
    resume: bool = False,
    **shape: Any,
) -> Run:
    """A model under the engine, `shape` as of `build`; without `summed`, without what sequence parallelism needs.

    With a folder the run saves there at `save_at`, or resumes from there and trains on from that step.
    """
    from megatron.core import parallel_state

    from ds_shampoo.frameworks.megatron_deepspeed.gradients import reduce_sequence_parallel_gradients
    from ds_shampoo.megatron import mpu

    model, kind = build(tensor_parallel, **shape), shape.get("kind", "gpt")
    count = reduce_sequence_parallel_gradients(model) if by_hand else 0
    unprepared = nullcontext() if summed else mock.patch.object(mpu, "shampoo_prepare")
    with unprepared, engine_of(model, config) as engine:
        start = named(engine.module)
        if resume:
            engine.load_checkpoint(folder)
        losses = [] if resume or not folder else train(engine, kind, 0, save_at)
        if folder and not resume:
            engine.save_checkpoint(folder)
        losses += train(engine, kind, save_at if folder else 0, steps)
        optimizer = engine.basic_optimizer
        blocks = [owned for group in optimizer._groups.values() for owned in group.owned_blocks]
        ready = [str(owned.block) for owned in blocks if owned.stack.ready[owned.slot]]
        rank = parallel_state.get_tensor_model_parallel_rank()
        return Run(losses, start, named(engine.module), optimizer.metrics(), ready, rank, count)


def named(model: nn.Module) -> dict[str, np.ndarray]:
    """This rank's parameters, whole also at ZeRO-3."""
    import deepspeed

    parameters = dict(model.named_parameters())
    held = [p for p in parameters.values() if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(held, enabled=bool(held)):
        return {name: p.detach().float().numpy().copy() for name, p in parameters.items()}
