"""What Shampoo can't do under DeepSpeed yet: each refused by name before training, never trained wrongly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ds_shampoo.config import SettingsError


def refuse_unsupported(engine: Any) -> None:
    """Checks an engine that is being set up.

    Raises:
        SettingsError: naming the first feature under which Shampoo does not run.
    """
    for refused, message in _REFUSALS:
        if refused(engine):
            raise SettingsError(message)


def _ask(engine: Any, method: str) -> Any:
    """An engine's answer, or None where this DeepSpeed does not know the question."""
    found = getattr(engine, method, None)
    return found() if callable(found) else None


def _offloads(engine: Any, *to: str) -> bool:
    offload = _ask(engine, "zero_offload_optimizer")
    return offload is not None and str(getattr(offload.device, "value", offload.device)) in to


_REFUSALS: tuple[tuple[Callable[[Any], Any], str], ...] = (
    (
        lambda e: _ask(e, "zero_optimization_stage") == 3,
        "zero_optimization.stage = 3: Shampoo does not support ZeRO-3 yet; use stage 0, 1 or 2",
    ),
    (
        lambda e: _ask(e, "fp16_enabled") and _ask(e, "zero_optimization_stage") == 0,
        "fp16.enabled = true at zero_optimization.stage = 0: there DeepSpeed unscales gradients that it never "
        "scaled; use stage 1 or 2, or bf16",
    ),
    (
        lambda e: _offloads(e, "nvme"),
        'zero_optimization.offload_optimizer.device = "nvme": Shampoo does not support it; use "cpu"',
    ),
    (
        lambda e: _ask(e, "zero_elastic_checkpoint"),
        "zero_optimization.elastic_checkpoint = true: such a checkpoint would lose Shampoo's factors; set it to false",
    ),
    (
        lambda e: _ask(e, "zenflow_config") is not None,
        "zero_optimization.zenflow: Shampoo does not support ZenFlow; leave it out",
    ),
    (
        lambda e: _ask(e, "fp16_master_weights_and_gradients") or _ask(e, "bf16_master_weights_and_gradients"),
        "fp16/bf16_master_weights_and_gradients = true: Shampoo needs fp32 master weights; set it to false",
    ),
    (
        lambda e: _ask(e, "torch_autocast_enabled"),
        "torch_autocast.enabled = true: Shampoo does not support DeepSpeed's autocast yet; use bf16 or fp16",
    ),
    (
        lambda e: _ask(e, "is_deepcompile_enabled"),
        "compile.deepcompile = true: Shampoo does not support DeepCompile; set it to false",
    ),
    (
        lambda e: _ask(e, "managed_gradient_accumulation") is False,
        "managed_gradient_accumulation = false: Shampoo has not been tried with it; leave it out",
    ),
    (
        lambda e: getattr(e, "pipeline_parallelism", False),
        "pipeline parallelism (PipelineModule): Shampoo does not support it yet",
    ),
    (
        lambda e: getattr(e, "has_moe_layers", False),
        "mixture-of-experts layers: Shampoo does not support expert parallelism yet",
    ),
    (
        lambda e: getattr(e, "sequence_parallel_size", 1) > 1,
        "sequence parallelism: Shampoo does not support it yet",
    ),
    (
        lambda e: _model_parallel_size(e) > 1,
        "tensor or model parallelism: Shampoo does not support it yet",
    ),
)


def _model_parallel_size(engine: Any) -> int:
    autotp = _ask(engine, "autotp_size") or 0
    mpu = getattr(engine, "mpu", None)
    size = getattr(mpu, "get_model_parallel_world_size", None)
    return max(autotp, size() if callable(size) else 1)
