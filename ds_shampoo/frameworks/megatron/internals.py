"""What Megatron-core does not document and Shampoo needs all the same: the only file that names it, checked at start.

Others use the functions below, by plain names. Documented, and used by any file, are `parallel_state`, process group
collections, the fields of its configurations, its modules' `config`, its layers and the optimizers' constructors,
`step`, `param_groups` and states.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ds_shampoo.frameworks.installed import Installed
from ds_shampoo.frameworks.privates import Entry, Field, Function, Given, Mark, Method, Private, Quoted, resolve
from ds_shampoo.parameters import marks

_OPTIMIZERS = "megatron.core.optimizer"
_WRAPPER = "megatron.core.optimizer.optimizer.MegatronOptimizer"
_FLOAT16 = "megatron.core.optimizer.optimizer.Float16OptimizerWithFloat16Params"
_CHAINED = "megatron.core.optimizer.optimizer.ChainedOptimizer"
_SHARDED = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
_REGISTRY = "megatron.core.optimizer.emerging_optimizers"
_PARALLEL = "megatron.core.distributed.DistributedDataParallel"
_PARALLEL_CONFIG = "megatron.core.distributed.DistributedDataParallelConfig"
_CONFIG = "megatron.core.optimizer.optimizer_config.OptimizerConfig"
_MODEL_CONFIG = "megatron.core.transformer.TransformerConfig"
_LAYER = "megatron.core.transformer.transformer_layer.TransformerLayer"
_LANGUAGE = "megatron.core.models.common.language_module.language_module.LanguageModule"
_SLICING = "megatron.core.tensor_parallel.layers.set_tensor_model_parallel_attributes"
_COLUMNS = "megatron.core.tensor_parallel.ColumnParallelLinear"
_ROWS = "megatron.core.tensor_parallel.RowParallelLinear"
_RANDOM = "megatron.core.tensor_parallel.random"
_SOFTMAX = "megatron.core.fusions.fused_softmax"
_NORM = "megatron.core.transformer.torch_norm"
_LAYER_WISE = "megatron.core.optimizer.layer_wise_optimizer.LayerWiseDistributedOptimizer"

# Every name, by whose it is.
NAMES: tuple[Private, ...] = (
    # How param groups are made of a model, and a key of each.
    Function(_OPTIMIZERS, "_get_param_groups", positional=3),
    Quoted(f"{_OPTIMIZERS}._get_param_groups", "is_expert_parallel"),
    # What wraps an inner optimizer: that one, what allocates its state, and whether it has no parameters on this rank.
    Given(_WRAPPER, "optimizer"),
    Given(_WRAPPER, "init_state_fn"),
    Given(_SHARDED, "is_stub_optimizer"),
    Given(_CHAINED, "chained_optimizers"),
    # The distributed optimizer, by param group: flat fp32 shards, of which parameters, and where in them they begin.
    Given(_SHARDED, "shard_fp32_from_float16_groups"),
    Given(_SHARDED, "model_float16_groups"),
    Given(_SHARDED, "shard_fp32_groups"),
    Given(_SHARDED, "model_fp32_groups"),
    Method(_SHARDED, "_get_model_param_range_map", positional=1),
    # Mixed precision without it, by param group: fp32 copies, and what they are of; the copy is on the parameter too.
    Given(_FLOAT16, "fp32_from_float16_groups"),
    Given(_FLOAT16, "float16_groups"),
    Given(_FLOAT16, "main_param"),
    # The optimizers that `config.optimizer` may name.
    Entry(_REGISTRY, "_EMERGING_OPTIMIZERS", since=(0, 18), kind=dict),
    Entry(_REGISTRY, "EmergingOptimizerEntry", since=(0, 18), kind=type),
    # A model: its parts' settings of data parallelism, its layers' numbers from 1 on over all stages, and its layers.
    Given(_PARALLEL, "ddp_config"),
    Given(_LAYER, "layer_number"),
    Given("megatron.core.models.gpt.GPTModel", "share_embeddings_and_output_weights"),
    Function("megatron.core.transformer.transformer_block", "_get_block_submodules", positional=2, named=("pp_rank",)),
    # Marks on parameters: of slices of a matrix, of what sees a part of the sequence only. Those of experts and of
    # matrices over the vocabulary are read in parameters/marks.py, since DeepSpeed and others know them too.
    Mark(_SLICING, "tensor_model_parallel"),
    Mark(_SLICING, "partition_dim"),
    Mark(_SLICING, "partition_stride"),
    Mark(_ROWS, "sequence_parallel"),
    Mark(_COLUMNS, marks.EXPERT),
    Given(_LANGUAGE, marks.EMBEDDING_OR_HEAD),
    Given(_LANGUAGE, marks.SHARED_EMBEDDING),
)

# Documented settings that are looked at: one of another name would be taken for what it was not.
SETTINGS: tuple[Private, ...] = (
    *(Field(_CONFIG, name) for name in ("lr", "weight_decay", "decoupled_weight_decay", "optimizer", "bf16", "fp16")),
    Field(_CONFIG, "use_distributed_optimizer"),
    Field(_CONFIG, "use_layer_wise_distributed_optimizer", since=(0, 18)),
    Field(_CONFIG, "use_precision_aware_optimizer"),
    Field(_CONFIG, "optimizer_cpu_offload"),
    Field(_CONFIG, "overlap_param_gather_with_optimizer_step"),
    Field(_PARALLEL_CONFIG, "use_distributed_optimizer"),
    Field(_PARALLEL_CONFIG, "use_megatron_fsdp"),
    Field(_PARALLEL_CONFIG, "num_distributed_optimizer_instances"),
    Field(_MODEL_CONFIG, "gated_linear_unit"),
    Field(_MODEL_CONFIG, "attention_output_gate"),
    *(Field(_MODEL_CONFIG, name) for name in ("kv_channels", "num_query_groups", "num_attention_heads")),
    *(Field(_MODEL_CONFIG, name) for name in ("num_moe_experts", "mtp_num_layers", "sequence_parallel")),
    *(Field(_MODEL_CONFIG, name) for name in ("fp8", "fp4", "recompute_granularity")),
)

# What asks for CUDA, and has something stood in for it where there is none.
STOOD_IN_FOR: tuple[Private, ...] = (
    Entry(_RANDOM, "_get_cuda_rng_state"),
    Entry(_RANDOM, "_set_cuda_rng_state"),
    Entry(_SOFTMAX, "get_default_causal_mask"),
    Entry(_NORM, "WrappedTorchNorm", kind=type),
    Method(_LAYER_WISE, "allgather_params"),
    Method(_LAYER_WISE, "broadcast_params"),
)


# What is found out about the installed release; to be checked before anything is built.
MEGATRON = Installed("megatron-core", "megatron.core", tested=(0, 19, 2), oldest=(0, 16), names=NAMES + SETTINGS)


# Megatron's optimizers.


class Run(NamedTuple):
    """What a tensor in Megatron's param groups stands for: a parameter's elements from `start` on."""

    parameter: Tensor
    start: int


def param_groups(chunks: Sequence[nn.Module], config: Any, overrides: Any) -> list[dict[str, Any]]:
    """The param groups that Megatron makes of a model's parameters: all of them, experts' apart."""
    from megatron.core.optimizer import _get_param_groups

    found: list[dict[str, Any]] = _get_param_groups(chunks, config, overrides)
    return found


def holds_experts(group: Mapping[str, Any]) -> bool:
    """Whether a param group is of experts that ranks divide."""
    return bool(group["is_expert_parallel"])


def wrappers_of(chained: Any) -> list[Any]:
    """The optimizers that a chained one steps, those without parameters on this rank among them."""
    return list(chained.chained_optimizers)


def stepping(chained: Any) -> Iterator[Any]:
    """Those of them that have parameters."""
    return (wrapper for wrapper in chained.chained_optimizers if not wrapper.is_stub_optimizer)


def inner_optimizer(wrapper: Any) -> Any:
    """What one of Megatron's optimizers wraps."""
    return wrapper.optimizer


def put_inside(wrapper: Any, inner: Any, allocate: Callable[..., None]) -> None:
    """Gives a wrapper another inner optimizer, and what allocates its state before it is loaded.

    Megatron makes its own inner optimizers where it makes wrappers.
    """
    wrapper.optimizer, wrapper.init_state_fn = inner, allocate


def runs_of(wrapper: Any) -> dict[int, Run]:
    """What every tensor in the param groups of one of Megatron's optimizers stands for, by `id(tensor)`."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

    if isinstance(wrapper, DistributedOptimizer):
        pairs = (
            (shard, parameter, wrapper._get_model_param_range_map(parameter)["param"].start)
            for shards, parameters in (
                *zip(wrapper.shard_fp32_from_float16_groups, wrapper.model_float16_groups, strict=True),
                *zip(wrapper.shard_fp32_groups, wrapper.model_fp32_groups, strict=True),
            )
            for shard, parameter in zip(shards, parameters, strict=True)
        )
        return {id(shard): Run(parameter, start) for shard, parameter, start in pairs}
    runs = {id(p): Run(p, 0) for group in wrapper.param_groups for p in group["params"]}
    if isinstance(wrapper, Float16OptimizerWithFloat16Params):
        for copies, parameters in zip(wrapper.fp32_from_float16_groups, wrapper.float16_groups, strict=True):
            runs |= {id(copy): Run(p, 0) for copy, p in zip(copies, parameters, strict=True)}
    return runs


def fp32_copy(parameter: Tensor) -> Tensor:
    """The fp32 copy that is stepped in a parameter's place; itself where there is none."""
    found: Tensor = getattr(parameter, "main_param", parameter)
    return found


def enter_optimizer(name: str, *, kind: type, allocate: Callable[..., None], arguments: Callable[..., Any]) -> bool:
    """Makes an optimizer known under the name that `config.optimizer` has.

    Args:
        kind: its class, called with param groups and `arguments`.
        allocate: what allocates its state before it is loaded.
        arguments: gives its keyword arguments, from Megatron's config, the model's parts and the process groups.

    Returns:
        Whether this Megatron looks them up; those before 0.18 don't.
    """
    try:
        registry: Any = importlib.import_module(_REGISTRY)
    except ModuleNotFoundError:
        return False
    registry._EMERGING_OPTIMIZERS[name] = registry.EmergingOptimizerEntry(kind, allocate, arguments, {})
    return True


# Megatron's models.


def data_parallelism(chunk: nn.Module) -> Any:
    """The DistributedDataParallelConfig of a part of a model."""
    return chunk.ddp_config


def shares_embedding(module: nn.Module) -> bool:
    """Whether a model's output head is its word embedding."""
    return bool(getattr(module, "share_embeddings_and_output_weights", False))


def number_over_stages(module: Any) -> int | None:
    """A layer's number, from 1 on over all pipeline stages; None for what is no layer."""
    number = getattr(module, "layer_number", None)
    return number if isinstance(number, int) else None


def layers_of(config: Any, spec: Any) -> Any:
    """The TransformerBlockSubmodules of a whole model, which has one pipeline stage by its config."""
    from megatron.core.transformer.transformer_block import _get_block_submodules

    return _get_block_submodules(config, spec, pp_rank=0)


# Marks on parameters. Megatron sets some of them on some of its layers only: the default holds for the rest.


def sliced_dim(parameter: Any) -> int | None:
    """The dimension of which this rank holds a slice; None for what is whole on every rank, or was never marked."""
    return int(parameter.partition_dim) if getattr(parameter, "tensor_model_parallel", False) else None


def fused_matrices(parameter: Tensor) -> int:
    """How many matrices are fused in one that is sliced, each sliced by itself."""
    return int(getattr(parameter, "partition_stride", 1))


def unmark_slice(parameter: Tensor) -> None:
    """Takes away the mark of a slice."""
    setattr(parameter, "tensor_model_parallel", False)  # noqa: B010


def sees_part_of_sequence(parameter: Tensor) -> bool:
    """Whether the gradient is that of this rank's part of the sequence only."""
    return bool(getattr(parameter, "sequence_parallel", False))


def mark_part_of_sequence(parameter: Tensor, part: bool) -> None:
    """Says that it is, or is not."""
    setattr(parameter, "sequence_parallel", part)  # noqa: B010


# A machine without CUDA.


def stand_in_for_cuda(
    *,
    get_rng_state: Callable[..., Tensor],
    set_rng_state: Callable[..., None],
    causal_mask: Callable[[int], Tensor],
    norm: Callable[..., nn.Module],
) -> None:
    """Puts these in the place of what asks for CUDA in Megatron, where nothing else decides what it asks for.

    Args:
        get_rng_state, set_rng_state: in the place of those of CUDA's random state.
        causal_mask: in that of what masks attention, recomputed in the backward pass.
        norm: in that of the constructor of torch's norms, with the norm's class, a configuration and the width.

    Raises:
        SettingsError: if any of it has moved.
    """
    MEGATRON.refuse_moved(STOOD_IN_FOR)
    random, softmax, norms = (importlib.import_module(name) for name in (_RANDOM, _SOFTMAX, _NORM))
    setattr(random, "_get_cuda_rng_state", get_rng_state)  # noqa: B010
    setattr(random, "_set_cuda_rng_state", set_rng_state)  # noqa: B010
    setattr(softmax, "get_default_causal_mask", causal_mask)  # noqa: B010
    setattr(norms.WrappedTorchNorm, "__new__", norm)  # noqa: B010
    experts = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(experts, "te_general_gemm"):  # asked for by name, and only imported with Transformer Engine
        setattr(experts, "te_general_gemm", None)  # noqa: B010
    # Gloo gathers equal sizes only; this is Megatron's own other way.
    layer_wise: Any = resolve(_LAYER_WISE)
    layer_wise.allgather_params = layer_wise.broadcast_params
