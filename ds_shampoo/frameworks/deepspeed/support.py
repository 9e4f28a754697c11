"""What Shampoo can't do under DeepSpeed yet: each refused by name before training, never trained wrongly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from ds_shampoo.algorithm import grafting
from ds_shampoo.algorithm.selection import Role
from ds_shampoo.config import SettingsError
from ds_shampoo.frameworks import protocols
from ds_shampoo.frameworks.deepspeed import internals
from ds_shampoo.frameworks.deepspeed.experts import foreign_experts
from ds_shampoo.frameworks.deepspeed.internals import DEEPSPEED
from ds_shampoo.sharding.gathering import gathered

_UNKNOWN_EXPERTS = (
    "expert model parallelism of Megatron: DeepSpeed does not know which ranks share an expert; call "
    "ds_shampoo.initialize with mpu=ds_shampoo.megatron.mpu, or ds_shampoo.megatron.register_experts(model) before "
    "deepspeed.initialize"
)

# The first release with which ZeRO-3 and pipelines were held to one trajectory.
_ONE_TRAJECTORY = (0, 19)


def refuse_unsupported(engine: Any) -> None:
    """Checks an engine that is being set up, and the DeepSpeed that it is of.

    Raises:
        SettingsError: naming the first feature under which Shampoo does not run, or what a release has otherwise.
    """
    DEEPSPEED.check()
    for refused, message in _REFUSALS:
        if refused(engine):
            raise SettingsError(message)


def refuse_factors_of_tied_layers(engine: Any, groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuses to precondition an embedding of which several pipeline stages hold a copy, in any param group.

    Each stage would keep factors of its own, and the copies would drift apart by rounding.

    Raises:
        SettingsError: naming the setting.
    """
    if not internals.tied_layers(engine):
        return
    for group in groups:
        if group["embedding"] != "diagonal":
            raise SettingsError(
                f"Shampoo setting 'embedding' = '{group['embedding']}': a pipeline with tied layers keeps a copy of "
                'them on several stages, which would drift apart; use "diagonal"'
            )


def refuse_tied_layers_of_several_roles(engine: Any, roles: Mapping[int, Role]) -> None:
    """Refuses copies of a layer that their pipeline stages take for different things, and would step differently.

    So they are where the stages build a layer by different classes. All ranks of a job call this at once.

    Args:
        roles: of this rank's parameters, by their ids.

    Raises:
        SettingsError: naming the parameter, what it is taken for, and the setting that decides it.
    """
    if not internals.has_pipeline(engine):
        return
    own = {
        f"{layer}.{name}": roles[id(parameter)].value
        for layer, module in internals.tied_layers(engine).items()
        for name, parameter in module.named_parameters()
        if id(parameter) in roles
    }
    found: dict[str, str] = {}
    for said in gathered(own):
        for name, role in said.items():
            if found.setdefault(name, role) != role:
                raise SettingsError(
                    f"the pipeline's tied parameter {name} is taken for one thing on one stage ({found[name]}) and for "
                    f"another on another ({role}): its copies would drift apart; set Shampoo's 'roles' to "
                    f'{{"tied_modules.{name}": "embedding"}}'
                )


def refuse_norms_of_slices(engine: Any, groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuses to divide by norms that would be those of a tensor-parallel rank's slice of a bias or an embedding.

    Raises:
        SettingsError: naming the setting.
    """
    if protocols.slices(getattr(engine, "mpu", None)) == 1:
        return
    for group in groups:
        if grafting.is_normalized(group["grafting"]):
            raise SettingsError(
                f"Shampoo setting 'grafting' = '{group['grafting']}': under tensor parallelism the norms of sliced "
                f'biases and embeddings would be their slices\'; use "{group["grafting"].removesuffix("_normalized")}"'
            )


def refuse_unknown_experts(model: Any) -> None:
    """Refuses experts that DeepSpeed can't place, before it fails over them without saying why.

    Raises:
        SettingsError: saying what to call.
    """
    if _has_unknown_experts(model):
        raise SettingsError(_UNKNOWN_EXPERTS)


def _ask(engine: Any, method: str) -> Any:
    """An engine's answer, or None where this DeepSpeed does not know the question."""
    found = getattr(engine, method, None)
    return found() if callable(found) else None


def _on_nvme(engine: Any, section: str) -> bool:
    offload = _ask(engine, section)
    return offload is not None and str(getattr(offload.device, "value", offload.device)) == "nvme"


def _pipelined(offload: Any) -> bool:
    return bool(offload.pipeline_read or offload.pipeline_write)


def _has_libaio() -> bool:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(AsyncIOBuilder().is_compatible())


def _has_unknown_experts(model: Any) -> bool:
    """Whether some parameter is one of the experts that ranks divide, and DeepSpeed can't know among which ranks."""
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    return any(internals.has_unknown_group(parameter) for parameter in parameters)


def _spreads_foreign_experts(engine: Any) -> Any:
    return _ask(engine, "zero_optimization_stage") == 3 and hasattr(engine, "module") and foreign_experts(engine.module)


def _partitions_activations(engine: Any) -> bool:
    section = internals.pipeline_section(engine)
    return bool(section.get("pipe_partitioned") or section.get("grad_partitioned"))


def _older_deepspeed() -> bool:
    return DEEPSPEED.release() < _ONE_TRAJECTORY


_REFUSALS: tuple[tuple[Callable[[Any], Any], str], ...] = (
    (
        lambda e: _ask(e, "zero_optimization_stage") == 3 and _older_deepspeed(),
        "zero_optimization.stage = 3: with DeepSpeed before 0.19 ranks were seen to drift apart there; upgrade "
        "DeepSpeed, or use stage 0, 1 or 2",
    ),
    (
        lambda e: internals.has_pipeline(e) and _older_deepspeed(),
        "pipeline parallelism (PipelineModule): with DeepSpeed before 0.19 it was seen to follow another trajectory; "
        "upgrade DeepSpeed",
    ),
    (
        lambda e: internals.has_pipeline(e) and (_ask(e, "zero_optimization_stage") or 0) > 1,
        "zero_optimization.stage = 2 or 3 with pipeline parallelism: DeepSpeed runs pipelines at stages 0 and 1 only",
    ),
    (
        lambda e: protocols.sees_part_of_sequence(getattr(e, "module", None)) and _partitions_activations(e),
        "pipeline.pipe_partitioned or grad_partitioned = true with sequence parallelism of Megatron: tensor-parallel "
        "ranks hold different parts of an activation; set both to false, as ds_shampoo.initialize does",
    ),
    (
        lambda e: _ask(e, "fp16_enabled") and _ask(e, "zero_optimization_stage") == 0,
        "fp16.enabled = true at zero_optimization.stage = 0: there DeepSpeed unscales gradients that it never "
        "scaled; use stage 1 or 2, or bf16",
    ),
    (
        lambda e: _ask(e, "bfloat16_enabled") and _ask(e, "zero_optimization_stage") == 0 and _older_deepspeed(),
        "bf16.enabled = true at zero_optimization.stage = 0: with DeepSpeed before 0.19 its fp32 weights were not "
        "found; use stage 1 or 2, or upgrade DeepSpeed",
    ),
    (
        lambda e: _on_nvme(e, "zero_offload_optimizer") and _ask(e, "zero_optimization_stage") != 3,
        'zero_optimization.offload_optimizer.device = "nvme": at stage 3 only; use "cpu"',
    ),
    (
        lambda e: _on_nvme(e, "zero_offload_optimizer") and not _has_libaio(),
        'zero_optimization.offload_optimizer.device = "nvme": DeepSpeed needs libaio for it, which is not here '
        '(apt-get install libaio-dev); or use "cpu"',
    ),
    (
        lambda e: _on_nvme(e, "zero_offload_optimizer") and _pipelined(_ask(e, "zero_offload_optimizer")),
        "zero_optimization.offload_optimizer.pipeline_read or pipeline_write = true with NVMe: the trajectory was seen "
        "to change; set them to false",
    ),
    (
        lambda e: _on_nvme(e, "zero_offload_param"),
        'zero_optimization.offload_param.device = "nvme": Shampoo does not support it; use "cpu"',
    ),
    (
        lambda e: getattr(_ask(e, "zero_offload_optimizer"), "super_offload", False),
        "zero_optimization.offload_optimizer.super_offload = true: it has an optimizer of its own; set it to false",
    ),
    (
        lambda e: (_ask(e, "zero_hpz_partition_size") or 1) > 1,
        "zero_optimization.zero_hpz_partition_size > 1: Shampoo has not been tried with ZeRO++; leave it out",
    ),
    (
        lambda e: _ask(e, "zero_quantized_weights") or _ask(e, "zero_quantized_gradients"),
        "zero_optimization.zero_quantized_weights or zero_quantized_gradients = true: Shampoo has not been tried with "
        "ZeRO++; set them to false",
    ),
    (
        lambda e: _ask(e, "zero_elastic_checkpoint"),
        "zero_optimization.elastic_checkpoint = true: such a checkpoint would lose Shampoo's factors; set it to false",
    ),
    (
        lambda e: _ask(e, "use_node_local_storage"),
        "checkpoint.use_node_local_storage = true: Shampoo's part of a checkpoint is read by ranks of other machines; "
        "set it to false and save to a folder that all machines share",
    ),
    (
        lambda e: _ask(e, "load_universal_checkpoint") and _ask(e, "zero_optimization_stage") == 0,
        "checkpoint.load_universal = true at zero_optimization.stage = 0: DeepSpeed would restore neither weights nor "
        "moments there; use stage 1, 2 or 3",
    ),
    (
        lambda e: _ask(e, "zenflow_config") is not None,
        "zero_optimization.zenflow: Shampoo does not support ZenFlow; leave it out",
    ),
    (
        lambda e: _ask(e, "fp16_master_weights_and_gradients") or _ask(e, "bf16_master_weights_and_gradients"),
        "fp16.fp16_master_weights_and_grads or bf16.bf16_master_weights_and_grads = true: Shampoo needs fp32 master "
        "weights; set them to false",
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
        internals.has_auto_experts,
        "expert_parallel.enabled = true (AutoEP): Shampoo has not been tried with it; use deepspeed.moe's layers",
    ),
    (
        lambda e: _has_unknown_experts(getattr(e, "module", None)),
        _UNKNOWN_EXPERTS,
    ),
    (
        _spreads_foreign_experts,
        "zero_optimization.stage = 3 with expert model parallelism of Megatron: DeepSpeed would spread every expert "
        "over ranks that have others; use stage 1 or 2",
    ),
    (
        lambda e: _ask(e, "managed_gradient_accumulation") is False,
        "managed_gradient_accumulation = false: Shampoo has not been tried with it; leave it out",
    ),
    (
        lambda e: internals.sequence_parallel_size(e) > 1,
        "sequence parallelism: Shampoo does not support it yet",
    ),
    (
        lambda e: _model_parallel_size(e) > 1,
        "tensor or model parallelism: Shampoo knows Megatron's alone, with mpu=ds_shampoo.megatron.mpu",
    ),
)


def _model_parallel_size(engine: Any) -> int:
    return max(int(_ask(engine, "autotp_size") or 1), protocols.unknown_slices(getattr(engine, "mpu", None)))
