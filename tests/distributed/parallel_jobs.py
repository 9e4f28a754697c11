"""Jobs whose ranks hold different layers or experts: DeepSpeed's pipeline engine and its mixture-of-experts layers."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import ds_shampoo
from ds_shampoo import Shampoo
from tests.distributed.jobs import CONTEXT, GLOBAL_BATCH, Trace, batch

WIDTH = 32
VOCABULARY = 256
MICRO_BATCHES = 2


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def layers() -> list[nn.Module]:
    """The layers of a small network on bytes; every call gives the same weights."""
    torch.manual_seed(0)
    return [
        nn.Embedding(VOCABULARY, WIDTH),
        nn.Linear(WIDTH, 96),
        nn.GELU(),
        nn.Linear(96, WIDTH),
        nn.LayerNorm(WIDTH),
        nn.Linear(WIDTH, 64),
        nn.GELU(),
        nn.Linear(64, VOCABULARY),
    ]


class Tied(nn.Module):
    """The same with one weight for embedding and head, in one process."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers()[:5])

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.layers(tokens), self.layers[0].weight)


def alone(model: nn.Module, settings: dict[str, Any], steps: int) -> Trace:
    """The model in one process without DeepSpeed."""
    optimizer, losses = Shampoo(model.parameters(), model=model, **settings), []
    start = named(model)
    for step in range(steps):
        windows = batch(step)
        loss = loss_of(model(windows[:, :-1]), windows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return Trace(losses, flat(start), flat(named(model)), optimizer.metrics(), {"end": named(model), "start": start})


def sequential(settings: dict[str, Any], steps: int, tied: bool) -> Trace:
    return alone(Tied() if tied else nn.Sequential(*layers()), settings, steps)


def named(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: p.detach().float().numpy().copy() for name, p in model.named_parameters()}


def flat(parameters: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([value.ravel() for value in parameters.values()])


class SharedEmbedding(nn.Embedding):
    """The embedding of `layers`, built anew by every stage that has it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(VOCABULARY, WIDTH)


class SharedHead(nn.Linear):
    """The same weight in a layer that does not say that it is an embedding."""

    def __init__(self) -> None:
        super().__init__(WIDTH, VOCABULARY, bias=False)
        self.weight.data = SharedEmbedding().weight.data


def tied_head(module: nn.Module, hidden: Tensor) -> Tensor:
    return F.linear(hidden, module.weight)


def started(model: nn.Module, parameters: list[Any], config: dict[str, Any], way: str) -> Any:
    """The engine; its Shampoo is named by the "config", or comes in as an "object" or out of a "callable"."""
    if way == "config":
        engine, *_ = ds_shampoo.initialize(model=model, model_parameters=parameters, config=config)
        return engine
    settings = config["optimizer"]["params"]
    config = {key: value for key, value in config.items() if key != "optimizer"}
    optimizer: Any = Shampoo(parameters, **settings) if way == "object" else lambda given: Shampoo(given, **settings)
    engine, *_ = ds_shampoo.initialize(model=model, optimizer=optimizer, model_parameters=parameters, config=config)
    return engine


def pipeline(
    config: dict[str, Any],
    steps: int,
    tied: bool,
    folder: str = "",
    save_at: int = 0,
    resume: bool = False,
    way: str = "config",
    head: type[nn.Module] = SharedEmbedding,
) -> Trace:
    """Two stages on every second rank; `extra` holds this stage's parameters by name. `way` as `started` takes it.

    A tied model's last stage makes its copy of the embedding by `head`.

    With a folder the run saves there at `save_at`, or resumes from there and trains on from that step.
    """
    import deepspeed
    from deepspeed.pipe import PipelineModule, TiedLayerSpec

    stack: list[Any] = list(layers())
    if tied:
        stack = [
            TiedLayerSpec("embedding", SharedEmbedding),
            *stack[1:5],
            TiedLayerSpec("embedding", head, forward_fn=tied_head),
        ]
    module = PipelineModule(layers=stack, num_stages=2, loss_fn=loss_of, partition_method="uniform")
    try:
        engine = started(module, list(module.parameters()), config, way)
        if resume:
            engine.load_checkpoint(folder)
        start = named(engine.module)
        dp, ranks = engine.grid.get_data_parallel_id(), engine.grid.get_data_parallel_world_size()
        losses = []
        for step in range(save_at if resume else 0, steps):
            if folder and step == save_at and not resume:
                engine.save_checkpoint(folder)
            mine = batch(step).chunk(ranks)[dp]
            micro = iter([(w[:, :-1], w[:, 1:]) for w in mine.chunk(MICRO_BATCHES)])
            losses.append(float(engine.train_batch(micro)))
        end, metrics, stage = named(engine.module), engine.basic_optimizer.metrics(), engine.stage_id
        let_go(engine)
        return Trace(losses, flat(start), flat(end), metrics, {"end": end, "stage": stage})
    finally:
        deepspeed.utils.groups.mpu = None  # DeepSpeed would hand the pipeline's grid on to the next engine
        end_groups(module)


def let_go(engine: Any) -> None:
    """Ends a pipeline's engine: tensors with hooks hold it and are held by it, a circle that no collector sees."""
    engine.destroy()
    vars(engine).clear()


def end_groups(module: Any) -> None:
    """Ends the process groups that DeepSpeed made for a PipelineModule: each has threads that never rest."""
    grid = module._grid
    own = [module.world_group, grid.ds_model_proc_group, grid.dp_proc_group, grid.pp_proc_group, grid.slice_proc_group]
    for group in [*own, *(each["group"] for each in module.tied_comms.values())]:
        dist.destroy_process_group(group)


class Experts(nn.Module):
    """A network with a mixture of two experts; every token's output is independent of the other tokens."""

    def __init__(self, ep_size: int, ep_rank: int) -> None:
        from deepspeed.moe.layer import MoE

        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.dense = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        weights = [torch.randn(WIDTH, WIDTH) / WIDTH**0.5 for _ in range(2)]
        gate = torch.randn(2, WIDTH)
        self.moe = MoE(
            WIDTH, nn.Linear(WIDTH, WIDTH), num_experts=2, ep_size=ep_size, k=1, drop_tokens=False, use_rts=False
        )
        with torch.no_grad():
            self.moe.deepspeed_moe.gate.wg.weight.copy_(gate)
            for local, expert in enumerate(self.moe.deepspeed_moe.experts.deepspeed_experts):
                expert.weight.copy_(weights[ep_rank + local])
                expert.bias.zero_()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + F.gelu(self.dense(x))
        out, *_ = self.moe(x)
        return self.head(x + out)


def experts(
    config: dict[str, Any],
    steps: int,
    ep_size: int,
    folder: str = "",
    save_at: int = 0,
    resume: bool = False,
    way: str = "config",
    split: bool = True,
) -> Trace:
    """Experts spread over `ep_size` ranks; `extra` holds parameters by name, experts numbered over all ranks.

    A folder and `way` mean what they mean to `pipeline`; without `split` all parameters are in one param group.
    """
    import deepspeed.comm as dist
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    ep_rank = dist.get_rank() % ep_size
    model = Experts(ep_size, ep_rank)
    groups: list[Any] = [{"params": list(model.parameters()), "name": "all"}]
    engine = started(
        model, split_params_into_different_moe_groups_for_optimizer(groups) if split else groups, config, way
    )
    try:
        if resume:
            engine.load_checkpoint(folder)
        start, losses = globally(named(engine.module), ep_rank), []
        rank, ranks = dist.get_rank(), dist.get_world_size()
        for step in range(save_at if resume else 0, steps):
            if folder and step == save_at and not resume:
                engine.save_checkpoint(folder)
            windows = batch(step).chunk(ranks)[rank]
            loss = loss_of(engine(windows[:, :-1]), windows[:, 1:])
            engine.backward(loss)
            engine.step()
            total = loss.detach().clone()
            torch.distributed.all_reduce(total)
            losses.append(total.item() / ranks)
        end = globally(named(engine.module), ep_rank)
        return Trace(losses, flat(start), flat(end), engine.basic_optimizer.metrics(), {"start": start, "end": end})
    finally:
        engine.destroy()


def globally(parameters: dict[str, np.ndarray], ep_rank: int) -> dict[str, np.ndarray]:
    """Numbers a rank's experts as they are numbered over all ranks."""
    out = OrderedDict()
    for name, value in parameters.items():
        before, found, after = name.partition("deepspeed_experts.")
        if found:
            local, _, rest = after.partition(".")
            name = f"{before}{found}{int(local) + ep_rank}.{rest}"
        out[name] = value
    return out


__all__ = ["CONTEXT", "GLOBAL_BATCH", "MICRO_BATCHES", "experts", "pipeline", "sequential"]
