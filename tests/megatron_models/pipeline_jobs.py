"""What the workers run: a Megatron GPT through DeepSpeed's pipeline engine, and the same undivided in one process."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import ds_shampoo
from tests.distributed.jobs import CONTEXT, batch
from tests.distributed.parallel_jobs import end_groups, let_go
from tests.megatron_models.jobs import Run, build, engine_of, named, train

MICRO_BATCHES = 2


def undivided(config: dict[str, Any], steps: int, **shape: Any) -> Run:
    """The GPTModel in one process, `shape` as of `build`."""
    model = build(1, **shape)
    initialize_by_name(dict(model.named_parameters()))
    with engine_of(model, config) as engine:
        start = named(engine.module)
        losses = train(engine, "gpt", 0, steps)
        return Run(losses, start, named(engine.module), engine.basic_optimizer.metrics(), in_force(engine), 0, 0)


def pipeline(
    config: dict[str, Any],
    steps: int,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 2,
    folder: str = "",
    save_at: int = 0,
    resume: bool = False,
    evaluate: bool = False,
    **shape: Any,
) -> Run:
    """The same GPT over stages, with its parameters under the undivided model's names.

    With a folder the run saves there at `save_at`, or resumes from there and trains on from that step. With `evaluate`
    the last loss is that of an evaluation on the first step's batch.
    """
    model = build(tensor_parallel, "pipeline", pipeline_parallel=pipeline_parallel, **shape)
    initialize_by_name(by_whole_name(model))
    with pipeline_engine(model, config) as engine:
        start = whole(model)
        if resume:
            engine.load_checkpoint(folder)
        losses = []
        for step in range(save_at if resume else 0, steps):
            if folder and step == save_at and not resume:
                engine.save_checkpoint(folder)
            losses.append(float(engine.train_batch(micro_batches(engine, step))))
        if evaluate:
            losses.append(float(engine.eval_batch(micro_batches(engine, 0))))
        rank = engine.grid.get_slice_parallel_rank()
        return Run(losses, start, whole(model), engine.basic_optimizer.metrics(), in_force(engine), rank, 0)


def refusal(
    config: dict[str, Any], tensor_parallel: int = 1, direct: bool = False, folder: str = "", **shape: Any
) -> str:
    """What a pipeline is refused with, at start or with a folder in loading; `direct` calls deepspeed.initialize."""
    import deepspeed

    try:
        model = build(tensor_parallel, "pipeline", **{"pipeline_parallel": 2, **shape})
        if direct:
            config = {**config, "zero_allow_untested_optimizer": True}
            with mock.patch.object(ds_shampoo, "initialize", deepspeed.initialize):
                pipeline_engine(model, config).__enter__()
        with pipeline_engine(model, config) as engine:
            if folder:
                engine.load_checkpoint(folder)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


@contextmanager
def pipeline_engine(model: nn.Module, config: dict[str, Any]) -> Iterator[Any]:
    import deepspeed

    try:
        engine, *_ = ds_shampoo.initialize(model=model, model_parameters=model.parameters(), config=config)
        yield engine
        let_go(engine)
    finally:
        deepspeed.utils.groups.mpu = None  # DeepSpeed would hand the pipeline's ranks on to the next engine
        end_groups(model)


def micro_batches(engine: Any, step: int) -> Iterator[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """This data-parallel rank's part of a step's batch."""
    mine = batch(step).chunk(engine.grid.get_data_parallel_world_size())[engine.grid.get_data_parallel_id()]
    for windows in mine.chunk(MICRO_BATCHES):
        tokens, labels = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
        places = torch.arange(CONTEXT).expand_as(tokens)
        yield (tokens, places), (labels, torch.ones(tokens.shape))


def by_whole_name(model: nn.Module) -> dict[str, nn.Parameter]:
    return {model.whole_model_name(name): p for name, p in model.named_parameters()}


def whole(model: nn.Module) -> dict[str, Any]:
    return {model.whole_model_name(name): value for name, value in named(model).items()}


def in_force(engine: Any) -> list[str]:
    """The blocks whose roots this rank has in force."""
    blocks = [owned for group in engine.basic_optimizer._groups.values() for owned in group.owned_blocks]
    return [str(owned.block) for owned in blocks if owned.stack.ready[owned.slot]]


def initialize_by_name(parameters: dict[str, nn.Parameter]) -> None:
    """Weights that depend on their name alone, and are a slice of the same matrix at any tensor-parallel size."""
    from megatron.core import parallel_state

    ranks, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    for name, parameter in parameters.items():
        if parameter.dim() < 2:
            continue
        dim = getattr(parameter, "partition_dim", None)
        shape = [size * ranks if at == dim else size for at, size in enumerate(parameter.shape)]
        matrix = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        with torch.no_grad():
            parameter.copy_(matrix if dim is None else matrix.chunk(ranks, dim)[rank])
