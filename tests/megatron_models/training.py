"""What the workers run under Megatron's own training: its schedules, its data parallelism, its optimizers."""

from __future__ import annotations

import copy
import dataclasses
import multiprocessing
import zlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from tests.distributed.jobs import CONTEXT, batch
from tests.megatron_models.jobs import SETTINGS, build

# What Megatron's own configuration says of it.
_MEGATRONS = ("lr", "weight_decay")


@dataclasses.dataclass
class Run:
    """Mean loss per step; this rank's parameters by their names in the whole model; its blocks with roots in force."""

    losses: list[float]
    end: dict[str, np.ndarray]
    preconditioned: list[str]
    metrics: dict[str, float]
    norms: list[float]
    rates: list[float]
    tensor_rank: int


def prepared(
    tensor_parallel: int = 1,
    settings: dict[str, Any] | None = None,
    distributed: bool = False,
    layer_wise: bool = False,
    bf16: bool = False,
    clip: float = 0.0,
    by_name: bool = False,
    registered: bool = False,
    **shape: Any,
) -> tuple[nn.Module, Any]:
    """A model and its optimizer; `shape` as of `build`, `by_name` gives stages and experts the same weights.

    `registered` is for Megatron's registry, which is there for a package of optimizers that is not looked at here.
    """
    settings = {**SETTINGS, **(settings or {})}
    model = build(tensor_parallel, **shape)
    if by_name:
        initialize_by_name(model)
    chunk = wrapped(model, distributed, bf16)
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from ds_shampoo.megatron import get_megatron_shampoo_optimizer, register_emerging_optimizer

    config = OptimizerConfig(
        lr=settings["lr"],
        min_lr=0.1 * settings["lr"],
        weight_decay=settings.get("weight_decay", 0.0),
        clip_grad=clip,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=distributed,
    )
    shampoo = {key: value for key, value in settings.items() if key not in _MEGATRONS}
    if registered:
        assert register_emerging_optimizer(**shampoo)
        config.optimizer, config.use_layer_wise_distributed_optimizer = "shampoo", layer_wise
        with mock.patch("megatron.core.optimizer.HAVE_EMERGING_OPTIMIZERS", True):
            return chunk, get_megatron_optimizer(config, [chunk], {})
    optimizer = get_megatron_shampoo_optimizer(
        config, [chunk], config_overrides={}, layer_wise_distributed_optimizer=layer_wise, **shampoo
    )
    return chunk, optimizer


def job(
    steps: int,
    tensor_parallel: int = 1,
    settings: dict[str, Any] | None = None,
    schedule: bool = False,
    folder: str = "",
    save_at: int = 0,
    resume: bool = False,
    sharding: str = "fully_reshardable",
    **how: Any,
) -> Run:
    """Megatron's training loop in small; `how` as of `prepared`.

    With a folder the run saves there at `save_at`, or resumes from there and trains on from that step.
    """
    chunk, optimizer = prepared(tensor_parallel, settings, **how)
    from megatron.core import parallel_state

    from ds_shampoo.frameworks.megatron.names import model_parameters

    scheduler = scheduler_of(optimizer) if schedule else None
    if resume:
        load(folder, chunk, optimizer, sharding)
    losses, norms, rates = [], [], []
    for step in range(save_at if resume else 0, steps):
        if folder and not resume and step == save_at:
            save(folder, chunk, optimizer, sharding)
        losses.append(train_step(chunk, optimizer, step, norms))
        rates.append(optimizer.param_groups[0]["lr"])
        if scheduler is not None:
            scheduler.step(1)
    found = model_parameters([chunk])
    end = {found[id(p)].name: p.detach().float().numpy().copy() for p in chunk.parameters()}
    inner = [wrapper.optimizer for wrapper in optimizer.chained_optimizers if not wrapper.is_stub_optimizer]
    blocks = [owned for shampoo in inner for subgroup in shampoo.subgroups() for owned in subgroup.sharded.owned_blocks]
    ready = [str(owned.block) for owned in blocks if owned.stack.ready[owned.slot]]
    rank = parallel_state.get_tensor_model_parallel_rank()
    metrics = optimizer.metrics() if hasattr(optimizer, "metrics") else inner[0].metrics()
    return Run(losses, end, ready, metrics, norms, rates, rank)


def initialize_by_name(model: nn.Module) -> None:
    """Weights that depend on their name in the whole model alone, not on what else is on this rank."""
    from ds_shampoo.frameworks.megatron.names import model_parameters

    found = model_parameters([model])
    for parameter in model.parameters():
        if parameter.dim() > 1:
            generator = torch.Generator().manual_seed(zlib.crc32(found[id(parameter)].name.encode()))
            with torch.no_grad():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def wrapped(model: nn.Module, distributed: bool, bf16: bool) -> nn.Module:
    """A model in Megatron's data parallelism, with the settings that its schedules look for."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.transformer.module import Float16Module

    config = model.config
    config.bf16, config.params_dtype = bf16, torch.bfloat16 if bf16 else torch.float32
    config.finalize_model_grads_func, config.deallocate_pipeline_outputs = finalize_model_grads, False
    if bf16:
        model = Float16Module(config, model)
    return DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=distributed, overlap_grad_reduce=False
        ),
        model,
    )


def undistributed() -> tuple[bool, str, str]:
    """Whether a run goes on as it did from a state in one dict, what refuses to give one, and what to load another."""
    chunk, optimizer = prepared()
    norms: list[float] = []
    for step in range(3):
        train_step(chunk, optimizer, step, norms)
    weights = copy.deepcopy(unwrapped(chunk).state_dict())
    try:
        state, error = copy.deepcopy(optimizer.state_dict()), ""
    except ValueError as refusal:
        return False, str(refusal), ""
    first = [train_step(chunk, optimizer, step, norms) for step in range(3, 6)]
    unwrapped(chunk).load_state_dict(weights)
    optimizer.load_state_dict(state)
    second = [train_step(chunk, optimizer, step, norms) for step in range(3, 6)]
    try:
        optimizer.load_state_dict({"state": {}, "param_groups": []})
    except ValueError as refusal:
        return first == second, error, str(refusal)
    return first == second, error, ""


def scheduler_of(optimizer: Any) -> Any:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=SETTINGS["lr"],
        min_lr=0.1 * SETTINGS["lr"],
        lr_warmup_steps=4,
        lr_decay_steps=20,
        lr_decay_style="cosine",
        start_wd=0.01,
        end_wd=0.02,
        wd_incr_steps=20,
        wd_incr_style="linear",
    )


def train_step(chunk: nn.Module, optimizer: Any, step: int, norms: list[float]) -> float:
    """One step on this rank's part of the batch; the mean loss over all ranks that have one."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    windows = batch(step).chunk(ranks)[rank]
    chunk.zero_grad_buffer()
    optimizer.zero_grad()
    reduced = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter([windows]),
        model=[chunk],
        num_microbatches=1,
        seq_length=CONTEXT,
        micro_batch_size=len(windows),
        forward_only=False,
    )
    updated, norm, _ = optimizer.step()
    assert updated
    norms.append(float(norm))
    total = torch.tensor([sum(float(part["loss"]) for part in reduced), float(len(reduced))])
    torch.distributed.all_reduce(total)
    return float(total[0] / total[1])


def forward_step(data: Iterator[Tensor], model: nn.Module) -> tuple[Tensor, Any]:
    windows = next(data)
    tokens, labels = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
    places = torch.arange(CONTEXT).expand_as(tokens)
    ahead = torch.triu(torch.ones(CONTEXT, CONTEXT, dtype=torch.bool), 1)[None, None]
    output = model(tokens, places, ahead, labels=labels)

    def loss_of(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = losses.float().mean()
        return loss, {"loss": loss.detach()}

    return output, loss_of


def save(folder: str, chunk: nn.Module, optimizer: Any, sharding: str) -> None:
    from megatron.core import dist_checkpointing

    model = unwrapped(chunk).sharded_state_dict()
    metadata = {"distrib_optim_sharding_type": sharding}
    whole = {"model": model, "optimizer": optimizer.sharded_state_dict(model, metadata=metadata)}
    # Its writers are processes of their own, which the daemons that workers are may not have.
    with mock.patch.dict(multiprocessing.current_process()._config, daemon=False):  # type: ignore[attr-defined]
        dist_checkpointing.save(whole, folder)


def load(folder: str, chunk: nn.Module, optimizer: Any, sharding: str) -> None:
    from megatron.core import dist_checkpointing

    model = unwrapped(chunk).sharded_state_dict()
    metadata = {"distrib_optim_sharding_type": sharding}
    wanted = {"model": model, "optimizer": optimizer.sharded_state_dict(model, is_loading=True, metadata=metadata)}
    found = dist_checkpointing.load(wanted, folder)
    unwrapped(chunk).load_state_dict(found["model"])
    optimizer.load_state_dict(found["optimizer"])


def unwrapped(chunk: nn.Module) -> nn.Module:
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk
