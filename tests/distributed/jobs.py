"""What the workers run: the real DeepSpeed engine on a small GPT and real text, and the same job without DeepSpeed."""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import hashlib
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import ds_shampoo
from ds_shampoo import Shampoo
from ds_shampoo.state.saving import blocks_state
from gpt.model import GPT, GPTConfig

GLOBAL_BATCH = 8
CONTEXT = 16
WIDTH = 32
LOSS_SCALE_POWER = 8
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Blocks of 24 on dims of 32, 96 and 128: many blocks, remainders, and borders of ranks that run through them. The
# ridge stands well above the rounding of fp32 statistics; see FP32 in test_parity.py.
# The paper's own direction, whose length is exchanged too, with fp32 products and one rate; a test names others.
SHAMPOO = {
    "lr": 3e-3, "preconditioner": "shampoo", "block_size": 24, "root_interval": 5, "weight_decay": 0.01,
    "matrix_epsilon": 1e-3, "matmul_precision": "highest", "embedding_lr_scale": 1.0,
}  # fmt: skip


@dataclass
class Trace:
    """What a job left: mean loss per step, all parameters flat in fp32, and what the optimizer counted on this rank."""

    losses: list[float]
    start: np.ndarray
    end: np.ndarray
    metrics: dict[str, float]
    extra: dict[str, Any] = field(default_factory=dict)


def build_model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(layers=2, d_model=WIDTH, heads=2, context=CONTEXT))


def widened(width: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Another job with a model of this width; in a worker of its own, since it stays so."""
    global WIDTH
    WIDTH = width
    return function(*arguments)


def batch(step: int, size: int = GLOBAL_BATCH) -> Tensor:
    """The windows [size, CONTEXT + 1] of one step, out of the standard library's own source."""
    text = torch.from_numpy(np.frombuffer(Path(argparse.__file__).read_bytes(), dtype=np.uint8).copy()).long()
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - CONTEXT - 1, (size,), generator=generator)
    return torch.stack([text[start : start + CONTEXT + 1] for start in starts.tolist()])


def flat(model: nn.Module) -> np.ndarray:
    """All parameters, whole, also where ZeRO-3 keeps pieces of them only."""
    parameters = list(model.parameters())
    with contextlib.ExitStack() as stack:
        if any(hasattr(p, "ds_id") for p in parameters):
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(parameters))
        return torch.cat([p.detach().float().reshape(-1) for p in parameters]).numpy()


def alone(
    steps: int,
    settings: dict[str, Any],
    clip: float = 0.0,
    groups: Callable[[nn.Module], Any] | None = None,
    shuffled: bool = False,
    precision: torch.dtype = torch.float32,
) -> Trace:
    """The reference: one process, `Shampoo` as a plain torch optimizer, no DeepSpeed.

    `shuffled` takes each batch's windows in reverse order: the same sums with other rounding. `precision` is that of
    the forward and backward passes; the optimizer steps fp32 master weights.
    """
    model = build_model().to(precision)
    master = copy.deepcopy(model).float()
    optimizer = Shampoo(groups(master) if groups else master.parameters(), model=master, **settings)
    scale = 2.0**LOSS_SCALE_POWER if precision == torch.float16 else 1.0
    start, losses = flat(model), []
    for step in range(steps):
        windows = batch(step).flip(0) if shuffled else batch(step)
        loss = model(windows[:, :-1], windows[:, 1:])
        (loss * scale).backward()
        for weight, p in zip(master.parameters(), model.parameters(), strict=True):
            weight.grad, p.grad = p.grad.float() / scale, None
        if clip:
            nn.utils.clip_grad_norm_(master.parameters(), clip)
        optimizer.step()
        model.load_state_dict(master.state_dict())
        losses.append(loss.item())
    exp_avg = torch.cat([optimizer.state[p]["exp_avg"].reshape(-1) for p in master.parameters()]).numpy()
    return Trace(losses, start, flat(model), optimizer.metrics(), {"exp_avg": exp_avg})


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Three param groups: matrices, matrices with settings of their own, and what is not decayed."""
    matrices = [p for name, p in model.named_parameters() if p.dim() > 1 and "mlp" not in name]
    wide = [p for name, p in model.named_parameters() if p.dim() > 1 and "mlp" in name]
    rest = [p for p in model.parameters() if p.dim() < 2]
    return [
        {"params": matrices},
        {"params": wide, "lr": 1e-3, "block_size": 40, "statistics_beta": 0.9},
        {"params": rest, "weight_decay": 0.0},
    ]


def role_groups(model: nn.Module) -> list[dict[str, Any]]:
    """`decay_groups`, of which the first overrides the job's settings by role."""
    first, *others = decay_groups(model)
    return [{**first, "embedding_lr_scale": 2.0, "head_betas": (0.9, 0.9)}, *others]


def an_empty_group_first(model: nn.Module) -> list[dict[str, Any]]:
    """Groups as a trainer makes them that splits parameters by what a model may have none of."""
    return [{"params": []}, *decay_groups(model)]


def a_frozen_group(model: nn.Module) -> list[dict[str, Any]]:
    """A group of which nothing is trained beside the usual ones."""
    first, *others = decay_groups(model)
    frozen = [p.requires_grad_(False) for p in first["params"][:2]]
    return [{"params": frozen}, {**first, "params": first["params"][2:]}, *others]


def engine_config(
    settings: dict[str, Any],
    stage: int,
    world_size: int,
    accumulation: int = 1,
    precision: str = "fp32",
    size: int = GLOBAL_BATCH,
    **other: Any,
) -> dict[str, Any]:
    """A DeepSpeed config of the job, for batches of `size`; `other` is merged in, `zero` into the ZeRO section."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": size // world_size // accumulation,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**6,
        "optimizer": {"type": "Shampoo", "params": settings},
        "zero_optimization": {"stage": stage, **other.pop("zero", {})},
    }
    if precision == "bf16":
        config["bf16"] = {"enabled": True}
    if precision == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": LOSS_SCALE_POWER}
    return {**config, **other}


def hidden_model(config: dict[str, Any]) -> GPT:
    """The same model, built under `deepspeed.zero.Init`, which hides the parameters' shapes."""
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=config):
        hidden = build_model()  # its own initialisation finds no elements to write to
    with deepspeed.zero.GatheredParameters(list(hidden.parameters()), modifier_rank=0):
        for parameter, value in zip(hidden.parameters(), build_model().parameters(), strict=True):
            parameter.data.copy_(value)
    return hidden


@contextlib.contextmanager
def engine_of(
    config: dict[str, Any],
    groups: Callable[[nn.Module], Any] | None = None,
    plain: bool = False,
    zero_init: bool = False,
) -> Iterator[Any]:
    """The engine through `ds_shampoo.initialize`, or `plain`ly through DeepSpeed's own with the flag in the config.

    `zero_init` takes the model of `hidden_model`.
    """
    import deepspeed

    model = hidden_model(config) if zero_init else build_model()
    parameters = groups(model) if groups else None
    if plain:
        config = {**copy.deepcopy(config), "zero_allow_untested_optimizer": True}
        engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, config=config)
    else:
        engine, *_ = ds_shampoo.initialize(model=model, model_parameters=parameters, config=config)
    try:
        yield engine
    finally:
        engine.destroy()


def train(engine: Any, first: int, steps: int) -> list[float]:
    """Steps `first`, ... of the job on the engine; every rank must hold the same parameters after each of them."""
    import deepspeed.comm as dist

    rank, world_size = dist.get_rank(), dist.get_world_size()
    losses = []
    for step in range(first, first + steps):
        mine = batch(step, engine.train_batch_size()).chunk(world_size)[rank]
        total = torch.zeros(())
        for windows in mine.chunk(engine.gradient_accumulation_steps()):
            loss = engine(windows[:, :-1], windows[:, 1:])
            engine.backward(loss)
            engine.step()
            total += loss.detach().float() / engine.gradient_accumulation_steps()
        torch.distributed.all_reduce(total)
        losses.append(total.item() / world_size)
        digest = hashlib.sha256(flat(engine.module).tobytes()).hexdigest()
        digests = [None] * world_size
        torch.distributed.all_gather_object(digests, digest)
        assert len(set(digests)) == 1, f"the ranks' parameters differ after step {step}"
    return losses


def job(
    config: dict[str, Any],
    steps: int,
    groups: Callable[[nn.Module], Any] | None = None,
    plain: bool = False,
    zero_init: bool = False,
) -> Trace:
    """The job from its beginning."""
    with engine_of(config, groups, plain, zero_init) as engine:
        start = flat(engine.module)
        losses = train(engine, 0, steps)
        return Trace(losses, start, flat(engine.module), engine.basic_optimizer.metrics())


def first_moments(config: dict[str, Any], steps: int) -> np.ndarray:
    """`exp_avg` of all parameters as DeepSpeed's own interface puts it together."""
    from deepspeed.utils import safe_get_full_optimizer_state

    with engine_of(config) as engine:
        train(engine, 0, steps)
        parts = [safe_get_full_optimizer_state(p, "exp_avg") for p in engine.module.parameters()]
        return torch.cat([part.reshape(-1) for part in parts]).numpy()


def overflowing(config: dict[str, Any], steps: int) -> tuple[int, bool, list[float]]:
    """Runs into fp16 overflow: how many steps were skipped, and whether a skipped step left every byte alone."""
    with engine_of(config) as engine:
        optimizer, untouched, skipped = engine.basic_optimizer, True, 0
        losses: list[float] = []
        for step in range(steps):
            before = fingerprint(engine, optimizer)
            losses += train(engine, step, 1)
            if engine.skipped_steps > skipped:
                skipped = engine.skipped_steps
                untouched &= fingerprint(engine, optimizer) == before
            else:
                assert fingerprint(engine, optimizer) != before
        return skipped, untouched, losses


def poisoned(config: dict[str, Any], steps: int, at: int, factor: float) -> tuple[bool, int, Trace]:
    """A run in which the last rank's loss of one additional step, before step `at`, is multiplied by `factor`.

    Returns:
        Whether that step left every byte alone, how many steps DeepSpeed counts as skipped, and the run.
    """
    import deepspeed.comm as dist

    with engine_of(config) as engine:
        optimizer, start = engine.basic_optimizer, flat(engine.module)
        losses = train(engine, 0, at)
        before = fingerprint(engine, optimizer)
        mine = batch(at).chunk(dist.get_world_size())[dist.get_rank()]
        loss = engine(mine[:, :-1], mine[:, 1:])
        engine.backward(loss * factor if dist.get_rank() == dist.get_world_size() - 1 else loss)
        engine.step()
        untouched = fingerprint(engine, optimizer) == before
        losses += train(engine, at, steps - at)
        return untouched, engine.skipped_steps, Trace(losses, start, flat(engine.module), optimizer.metrics())


def set_aside(config: dict[str, Any], steps: int, at: int) -> Trace:
    """A run whose states leave the device before step `at` and come back."""
    with engine_of(config) as engine:
        start = flat(engine.module)
        losses = train(engine, 0, at)
        before = fingerprint(engine, engine.basic_optimizer)
        engine.offload_states(pin_memory=False)
        assert fingerprint(engine, engine.basic_optimizer) == before
        engine.reload_states()
        assert fingerprint(engine, engine.basic_optimizer) == before
        losses += train(engine, at, steps - at)
        return Trace(losses, start, flat(engine.module), engine.basic_optimizer.metrics())


def fingerprint(engine: Any, optimizer: Shampoo) -> str:
    """A hash of every tensor and number of the optimizer's state, and of the parameters."""
    digest = hashlib.sha256(flat(engine.module).tobytes())

    def take(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                digest.update(str(key).encode())
                take(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                take(item)
        else:
            digest.update(repr(value).encode())

    # Not by `state_dict`: under ZeRO-3 the param groups are empty but for DeepSpeed's own saving.
    take({"state": list(optimizer.state.values()), "blocks": blocks_state(optimizer._groups.values())})
    return digest.hexdigest()


def resumed(
    config: dict[str, Any], folder: str, save_at: int, steps: int
) -> tuple[list[float], list[float], bool, bool]:
    """A run that saves at `save_at` and goes on, and one that loads that checkpoint into a new engine.

    Returns:
        Both runs' losses after the save, whether their parameters end bit-equal, and their states too.
    """
    with engine_of(config) as engine:
        train(engine, 0, save_at)
        engine.save_checkpoint(folder, tag="half")
        losses = train(engine, save_at, steps - save_at)
        end, state = flat(engine.module), fingerprint(engine, engine.basic_optimizer)
    with engine_of(config) as engine:
        engine.load_checkpoint(folder, tag="half")
        again = train(engine, save_at, steps - save_at)
        same_state = fingerprint(engine, engine.basic_optimizer) == state
        return losses, again, np.array_equal(flat(engine.module), end), same_state


def saving(
    config: dict[str, Any],
    folder: str,
    save_at: int,
    steps: int,
    groups: Callable[[nn.Module], Any] | None = None,
) -> Trace:
    """A run that saves at `save_at` and goes on to `steps`; the losses are those after the save."""
    with engine_of(config, groups) as engine:
        start = flat(engine.module)
        train(engine, 0, save_at)
        engine.save_checkpoint(folder)
        losses = train(engine, save_at, steps - save_at)
        return Trace(losses, start, flat(engine.module), engine.basic_optimizer.metrics())


def loading(
    config: dict[str, Any],
    folder: str,
    first: int,
    steps: int,
    groups: Callable[[nn.Module], Any] | None = None,
    **options: Any,
) -> Trace:
    """A new engine that takes up the latest checkpoint of the folder and trains steps `first` to `steps`."""
    with engine_of(config, groups) as engine:
        path, _ = engine.load_checkpoint(folder, **options)
        assert path is not None
        start = flat(engine.module)
        stacks = [stack for group in engine.basic_optimizer._groups.values() for stack in group.stacks]
        extra = {"in_force": sum(sum(stack.ready) for stack in stacks)}
        losses = train(engine, first, steps - first)
        return Trace(losses, start, flat(engine.module), engine.basic_optimizer.metrics(), extra)


def plain_saving(config: dict[str, Any], folder: str, steps: int) -> None:
    """As `saving`, with any optimizer, and no further than the save."""
    with engine_of(config) as engine:
        train(engine, 0, steps)
        engine.save_checkpoint(folder)


def plain_loading(config: dict[str, Any], folder: str, first: int, steps: int) -> list[float]:
    """As `loading`, with any optimizer."""
    with engine_of(config) as engine:
        path, _ = engine.load_checkpoint(folder)
        assert path is not None
        return train(engine, first, steps - first)


def saving_again(
    config: dict[str, Any], folder: str, first: int, steps: int, groups: Callable[[nn.Module], Any] | None = None
) -> None:
    """As `loading`, and a checkpoint at the end."""
    with engine_of(config, groups) as engine:
        engine.load_checkpoint(folder)
        train(engine, first, steps - first)
        engine.save_checkpoint(folder)


def failing_to_save(config: dict[str, Any], folder: str, tag: str) -> str:
    """The message with which saving over a checkpoint fails where the last rank may write small files only."""
    import deepspeed.comm as dist

    with engine_of(config) as engine:
        train(engine, 0, 2)
        usual = resource.getrlimit(resource.RLIMIT_FSIZE)
        if dist.get_rank() == dist.get_world_size() - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, usual[1]))
        try:
            engine.save_checkpoint(folder, tag)
        except RuntimeError as error:
            return str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        return ""


def failing_to_load(
    config: dict[str, Any], folder: str, groups: Callable[[nn.Module], Any] | None = None
) -> tuple[str, bool]:
    """The message with which loading fails, and whether it left every state alone."""
    with engine_of(config, groups) as engine:
        train(engine, 0, 2)
        before = fingerprint(engine, engine.basic_optimizer)
        try:
            engine.load_checkpoint(folder)
        except RuntimeError as error:
            return str(error), fingerprint(engine, engine.basic_optimizer) == before
        return "", False


def saving_between_micro_batches(config: dict[str, Any], folder: str) -> str:
    with engine_of(config) as engine:
        windows = batch(0)[:2]
        engine.backward(engine(windows[:, :-1], windows[:, 1:]))
        engine.step()
        try:
            engine.save_checkpoint(folder)
        except RuntimeError as error:
            return str(error)
        return ""


def tiny(config: dict[str, Any], steps: int, matrices: int) -> tuple[list[float], dict[str, float]]:
    """A model with this many preconditioned blocks of one piece each, on however many ranks there are."""
    import deepspeed.comm as dist

    torch.manual_seed(0)
    model: nn.Module = nn.ModuleList([nn.Linear(6, 6, bias=False) for _ in range(matrices)])
    model.scale = nn.Parameter(torch.ones(6))  # type: ignore[assignment]
    model.forward = functools.partial(_tiny_loss, model)  # type: ignore[method-assign]
    engine, *_ = ds_shampoo.initialize(model=model, config=config)
    try:
        losses = []
        for step in range(steps):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
            loss = engine(x)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        digests: list[Any] = [None] * dist.get_world_size()
        torch.distributed.all_gather_object(digests, hashlib.sha256(flat(engine.module).tobytes()).hexdigest())
        assert len(set(digests)) == 1
        return losses, engine.basic_optimizer.metrics()
    finally:
        engine.destroy()


class Branches(nn.Module):
    """Two layers side by side, of which the second takes part from step `asleep` on.

    Until then it gets a gradient of zeros, or with `unused` none at all.
    """

    def __init__(self, asleep: int, unused: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.awake, self.sleeper = (nn.Linear(6, 6, bias=False) for _ in range(2))
        self.asleep, self.unused, self.step = asleep, unused, 0

    def forward(self, x: Tensor) -> Tensor:
        out = self.awake(x)
        if self.step >= self.asleep:
            out = out + self.sleeper(x)
        elif not self.unused:
            out = out + 0.0 * self.sleeper(x)
        self.step += 1
        return (out - x.roll(1, dims=1)).square().mean()


def sleeping(config: dict[str, Any] | None, settings: dict[str, Any], steps: int, asleep: int, unused: bool) -> Trace:
    """`Branches` under the engine, with the same data on every rank; without a config in one process."""
    model = Branches(asleep, unused)
    start, losses = flat(model), []
    engine, optimizer = None, None
    if config is None:
        optimizer = Shampoo(model.parameters(), model=model, **settings)
    else:
        engine, *_ = ds_shampoo.initialize(model=model, config=config)
        optimizer = engine.basic_optimizer
    try:
        for step in range(steps):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
            loss = (engine or model)(x)
            if engine is not None:
                engine.backward(loss)
                engine.step()
            else:
                loss.backward()
                for parameter in model.parameters():
                    parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        return Trace(losses, start, flat(model), optimizer.metrics())
    finally:
        if engine is not None:
            engine.destroy()


def _tiny_loss(model: Any, x: Tensor) -> Tensor:
    out = x
    for layer in model:
        out = layer(out)
    return (out * model.scale - x.roll(1, dims=1)).square().mean()


def refused(config: dict[str, Any]) -> str:
    """The message with which `initialize` refuses a config."""
    from deepspeed.utils import groups

    try:
        with engine_of(config):
            return ""
    except ValueError as error:
        return str(error)
    finally:
        groups.mesh_device = None  # sequence parallelism would stay on for the next engine
