"""What DeepSpeed does not document and Shampoo needs all the same: the only file that names it, and checks it at start.

Others use the functions and views below, by plain names. Documented, and used by any file, are an engine's questions
about its config (`zero_optimization_stage()`, ...), what `deepspeed.initialize` takes and returns (`module`,
`optimizer`, `mpu`), `device`, `global_rank`, `global_steps`, `train_batch_size()`, `save_checkpoint`,
`load_checkpoint`, and the layers of `deepspeed.moe` and `deepspeed.pipe`.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ds_shampoo.frameworks.installed import Installed
from ds_shampoo.frameworks.privates import Entry, Function, Given, Method, Private, Quoted
from ds_shampoo.parameters import marks

_CONFIG = "deepspeed.runtime.config.DeepSpeedConfig"
ENGINE = "deepspeed.runtime.engine.DeepSpeedEngine"
ENGINE_MODULE = ENGINE.rpartition(".")[0]
CONFIGURING = f"{ENGINE}._configure_optimizer(self, client_optimizer, model_parameters)"
_PIPELINE = "deepspeed.runtime.pipe.module.PipelineModule"
_WRITER = "deepspeed.runtime.checkpoint_engine.checkpoint_engine.CheckpointEngine"
_FLAT = "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"
_BF16 = "deepspeed.runtime.bf16_optimizer.BF16_Optimizer"
_STAGE3 = "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3"
_LINKS = "deepspeed.utils.mixed_precision_linkage"
_PIECES = "deepspeed.runtime.zero.partition_parameters.Init"
_EXPERTS = "deepspeed.moe.experts.Experts"
_GROUPS = "deepspeed.utils.groups"
_CONSTANTS = "deepspeed.checkpoint.constants"

# Every name, by whose it is.
NAMES: tuple[Private, ...] = (
    Given(_CONFIG, "_param_dict"),  # the JSON
    Given(_CONFIG, "pipeline"),  # its section, defaults filled in
    Given(_CONFIG, "expert_parallel_config", since=(0, 19, 2)),
    Given(ENGINE, "_config"),
    Given(ENGINE, "basic_optimizer"),  # what ZeRO wraps
    Given(ENGINE, "client_optimizer"),  # what `initialize` was given as such
    *(Given(ENGINE, name) for name in ("mp_world_size", "sequence_parallel_size")),
    *(Given(ENGINE, name) for name in ("pipeline_parallelism", "has_moe_layers")),
    Given(ENGINE, "seq_data_parallel_group"),  # the ranks that hold the same parameters, experts apart
    Given(ENGINE, "expert_data_parallel_group"),  # those that hold the same experts, by the groups' names
    *(Given(ENGINE, name) for name in ("monitor", "global_samples", "checkpoint_engine")),
    Method(ENGINE, "_configure_optimizer", named=("client_optimizer", "model_parameters")),
    Method(ENGINE, "_copy_recovery_script", passed_on=True),
    Given(_PIPELINE, "tied_modules"),
    Given(_PIPELINE, "ds_pipe_replicated"),  # on a tied parameter: that another stage's copy counts in the norm
    Quoted("deepspeed.runtime.utils.is_model_parallel_parameter", "model_parallel"),  # on one: that every rank's counts
    Method(_PIPELINE, "num_pipeline_stages"),
    Method(_WRITER, "is_decoupled", since=(0, 17, 1)),
    # Stages 1 and 2, and BF16_Optimizer: by param group, this rank's flat fp32 share, and whose it is.
    *(Given(_FLAT, name) for name in ("single_partition_of_fp32_groups", "bit16_groups")),
    *(Given(_BF16, name) for name in ("fp32_groups_flat_partition", "bf16_groups")),
    Given(_LINKS, "_dp_group"),  # on a parameter: the ranks that share its flat tensor
    # Stage 3: by sub-group, its flat fp32 tensor, how many elements belong there, whose pieces, and its param group.
    *(Given(_STAGE3, name) for name in ("fp32_partitioned_groups_flat", "fp16_partitioned_groups_flat_numel")),
    *(Given(_STAGE3, name) for name in ("fp16_groups", "sub_group_to_group_id", "dp_process_group")),
    Method(_STAGE3, "_get_sub_group_process_group", positional=1, since=(0, 19, 3)),
    Method(_STAGE3, "_swappable_optimizer_subgroup", positional=1),
    Given(_PIECES, marks.WHOLE_SHAPE),  # on a parameter: its whole shape,
    Given(_PIECES, "ds_tensor"),  # this rank's piece of it, padded,
    Given(_PIECES, "partition_numel"),  # and the length of a piece, a function
    # Experts: marks on their parameters, and where groups of ranks are looked up by the name in a mark.
    Given(_EXPERTS, marks.EXPERT),
    Given(_EXPERTS, "group_name"),
    Function(_GROUPS, "_get_expert_parallel_rank", positional=1),
    *(Entry(_GROUPS, f"_EXPERT_{what}_GROUP", kind=dict) for what in ("PARALLEL", "DATA_PARALLEL")),
    Entry(_GROUPS, "_EXPERT_PARALLEL_GROUP_RANKS", kind=dict, since=(0, 17, 1)),
    Entry(_GROUPS, "_EXPERT_DATA_PARALLEL_GROUP_RANKS", kind=dict, since=(0, 17, 1)),
    *(Entry(_CONSTANTS, name, kind=str) for name in ("UNIVERSAL_CHECKPOINT_INFO", "UNIVERSAL_CHECKPOINT_VERSION_KEY")),
    Entry(_CONSTANTS, "PIPELINE_REPLICATED_PARAMETER_PATTERNS", kind=str),
    Entry(_CONSTANTS, "UNIVERSAL_CHECKPOINT_VERSION_VALUE", kind=float),
)

# What is documented, or known by its use, but stood in for: with these arguments.
STOOD_IN_FOR: tuple[Private, ...] = (
    *(Given(_CONFIG, name) for name in ("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer")),
    Method(ENGINE, "save_checkpoint", named=("save_dir", "tag", "save_latest")),
    Method(
        ENGINE,
        "load_checkpoint",
        named=("load_dir", "tag", "load_module_strict", "load_optimizer_states", "load_module_only", "custom_load_fn"),
    ),
    Method(_WRITER, "save", positional=2),
    Method(_WRITER, "makedirs", positional=1, named=("exist_ok",)),
)

# What is found out about the installed release; to be checked before an engine trains.
DEEPSPEED = Installed("DeepSpeed", "deepspeed", tested=(0, 19, 8), oldest=(0, 16), names=NAMES + STOOD_IN_FOR)


# What is asked of engines that are being set up, and may not have it yet: `check` has seen that they will.


def engine_type(module: ModuleType) -> Any | None:
    """The class of DeepSpeed's engines, of the module that has it; None where that has none."""
    return getattr(module, ENGINE.rpartition(".")[2], None)


def configuring_method(engine_type: Any) -> Callable[..., None] | None:
    """The method in which an engine gets its optimizer; None where there is no such one with these arguments."""
    found: Callable[..., None] | None = getattr(engine_type, "_configure_optimizer", None)
    arguments = list(inspect.signature(found).parameters) if found is not None else []
    return found if arguments == ["self", "client_optimizer", "model_parameters"] else None


def replace_configuring_method(engine_type: Any, method: Callable[..., None]) -> None:
    """Puts another in its place, in all engines: DeepSpeed has no hook for what is to be done before and after it."""
    engine_type._configure_optimizer = method


def inner_optimizer(engine: Any) -> Any:
    """The optimizer that ZeRO's wrapper steps; without one, that which the user sees; None before there is any."""
    return getattr(engine, "basic_optimizer", None)


def override_config(engine: Any, key: str, value: Any) -> None:
    """Has a key of the config hold otherwise: the engine reads it when it has its optimizer."""
    setattr(DEEPSPEED.of(engine, "_config"), key, value)


def config_of(engine: Any) -> Any:
    """The config from which an engine is built, as a dict; None where it has none yet."""
    return getattr(getattr(engine, "_config", None), "_param_dict", None)


def pipeline_section(engine: Any) -> Mapping[str, Any]:
    """The config's section "pipeline", with DeepSpeed's defaults."""
    return getattr(getattr(engine, "_config", None), "pipeline", None) or {}


def has_auto_experts(engine: Any) -> bool:
    """Whether DeepSpeed makes experts of a model's own layers (AutoEP), as older releases never do."""
    section = getattr(getattr(engine, "_config", None), "expert_parallel_config", None)
    return bool(getattr(section, "enabled", False))


def has_pipeline(engine: Any) -> bool:
    """Whether its model is a PipelineModule."""
    return bool(getattr(engine, "pipeline_parallelism", False))


def tied_layers(engine: Any) -> Mapping[str, nn.Module]:
    """The layers of this stage of a pipeline that another one has too, by their names in `tied_modules`."""
    return dict(getattr(engine.module, "tied_modules", None) or {})


def sequence_parallel_size(engine: Any) -> int:
    """Over how many ranks DeepSpeed divides a sequence."""
    return int(getattr(engine, "sequence_parallel_size", 1))


# What is asked of engines that are complete.


def given_optimizer(engine: Any) -> Any:
    """What `deepspeed.initialize` was given as the optimizer: an object, a callable, or None."""
    return DEEPSPEED.of(engine, "client_optimizer")


def pipeline_stages(engine: Any) -> int:
    """Over how many stages a pipeline runs; 1 without."""
    return int(DEEPSPEED.of(engine.module, "num_pipeline_stages")()) if has_pipeline(engine) else 1


def is_counted_elsewhere(parameter: Tensor) -> bool:
    """Whether DeepSpeed counts another stage's copy of a pipeline's parameter in the norm of all gradients."""
    return bool(DEEPSPEED.of(parameter, "ds_pipe_replicated"))


def count_on_every_rank(parameter: Tensor) -> None:
    """Has DeepSpeed count a parameter in that norm on every rank, as a slice of a whole."""
    setattr(parameter, "model_parallel", True)  # noqa: B010


def divides_the_model(engine: Any) -> bool:
    """Whether ranks have different parameters: pipeline stages, experts, or slices."""
    experts, slices = DEEPSPEED.of(engine, "has_moe_layers"), DEEPSPEED.of(engine, "mp_world_size")
    return has_pipeline(engine) or bool(experts) or slices > 1


def replicas(engine: Any, group: str | None) -> dist.ProcessGroup:
    """The ranks that hold the same parameters: those of an expert group, or the data-parallel ones for None."""
    if group is None:
        found: dist.ProcessGroup = DEEPSPEED.of(engine, "seq_data_parallel_group")
    else:
        found = DEEPSPEED.of(engine, "expert_data_parallel_group")[group]
    return found


def monitor(engine: Any) -> Any:
    """The engine's MonitorMaster."""
    return DEEPSPEED.of(engine, "monitor")


def samples(engine: Any) -> int:
    """What the engine has trained on so far, in all ranks together."""
    return int(DEEPSPEED.of(engine, "global_samples"))


# Checkpoints.


def take_over_checkpoints(
    engine: Any,
    saving: Callable[[Callable[..., Any]], Callable[..., Any]],
    loading: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> None:
    """Puts what `saving` and `loading` make of an engine's own `save_checkpoint` and `load_checkpoint` in their place.

    DeepSpeed has no hook around them. Only the one engine changes.
    """
    engine.save_checkpoint = saving(engine.save_checkpoint)
    engine.load_checkpoint = loading(engine.load_checkpoint)


def checkpoint_writer(engine: Any) -> Any:
    """What writes an engine's files, of DeepSpeed's type CheckpointEngine."""
    return DEEPSPEED.of(engine, "checkpoint_engine")


def writes_later(engine: Any) -> bool:
    """Whether that writes in the background, and names the latest checkpoint itself; older releases have no such."""
    ask = getattr(checkpoint_writer(engine), "is_decoupled", None)
    return bool(ask()) if ask is not None else False


def tell_of_tied_layers(engine: Any) -> None:
    """Has a pipeline's checkpoints say which of the first stage's parameters later stages hold copies of.

    The converter to the universal form joins the pieces of all stages, unless the first stage's file says so; what it
    says is an attribute of the module.
    """
    from deepspeed.checkpoint import constants as keys

    tied = [rf"tied_modules\.{re.escape(name)}\." for name in tied_layers(engine)]
    if tied and not hasattr(engine.module, keys.UNIVERSAL_CHECKPOINT_INFO):
        version = {keys.UNIVERSAL_CHECKPOINT_VERSION_KEY: keys.UNIVERSAL_CHECKPOINT_VERSION_VALUE}
        info = {**version, keys.PIPELINE_REPLICATED_PARAMETER_PATTERNS: tied}
        setattr(engine.module, keys.UNIVERSAL_CHECKPOINT_INFO, info)


@contextlib.contextmanager
def writing_by(engine: Any, writer: Any, script: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Has an engine write its files by another writer, and copy its recovery script as `script` makes of its own way.

    DeepSpeed takes no writer of others', and copies the script by no writer.
    """
    usual, copies = checkpoint_writer(engine), DEEPSPEED.of(engine, "_copy_recovery_script")
    engine.checkpoint_engine = writer
    engine._copy_recovery_script = script(copies)
    try:
        yield
    finally:
        engine.checkpoint_engine = usual
        del engine._copy_recovery_script


# What ZeRO's wrappers hold.


def flattened(zero: Any, flat: Tensor) -> Sequence[Tensor] | None:
    """The parameters in the flat tensor of a param group, at stages 1 and 2; None where it is not of that wrapper's.

    Raises:
        RuntimeError: if the wrapper is of no kind that is known.
    """
    if hasattr(zero, "fp32_groups_flat_partition"):
        flats, groups = zero.fp32_groups_flat_partition, DEEPSPEED.of(zero, "bf16_groups")
    else:
        flats, groups = DEEPSPEED.of(zero, "single_partition_of_fp32_groups"), DEEPSPEED.of(zero, "bit16_groups")
    return next((parameters for held, parameters in zip(flats, groups, strict=False) if held is flat), None)


def sharers(parameter: Tensor) -> dist.ProcessGroup:
    """The ranks that share the flat tensor in which a parameter lies, at stages 1 and 2."""
    found: dist.ProcessGroup = DEEPSPEED.of(parameter, "_dp_group")
    return found


@dataclass(frozen=True)
class SubGroups:
    """The parts of param groups that stage 3 steps one after the other.

    Attributes:
        flats: the fp32 tensor of each, flat; empty while it is on NVMe.
        sizes: the elements that belong there, padding included.
        parameters: those whose pieces lie in it, in order.
        param_group: the number of the param group that it is a part of.
    """

    flats: Sequence[Tensor]
    sizes: Sequence[int]
    parameters: Sequence[Sequence[Tensor]]
    param_group: Mapping[int, int]
    _zero: Any

    @classmethod
    def of(cls, zero: Any) -> SubGroups:
        """Those of an engine's wrapper.

        Raises:
            RuntimeError: naming what it has no more.
        """
        return cls(
            flats=DEEPSPEED.of(zero, "fp32_partitioned_groups_flat"),
            sizes=DEEPSPEED.of(zero, "fp16_partitioned_groups_flat_numel"),
            parameters=DEEPSPEED.of(zero, "fp16_groups"),
            param_group=DEEPSPEED.of(zero, "sub_group_to_group_id"),
            _zero=zero,
        )

    def process_group(self, number: int) -> dist.ProcessGroup:
        """The ranks over which a sub-group lies; before 0.19.3 the same for all."""
        ask = getattr(self._zero, "_get_sub_group_process_group", None)
        found: dist.ProcessGroup = ask(number) if ask is not None else DEEPSPEED.of(self._zero, "dp_process_group")
        return found

    def on_nvme(self, number: int) -> bool:
        """Whether a sub-group is moved out to NVMe between its steps."""
        return bool(DEEPSPEED.of(self._zero, "_swappable_optimizer_subgroup")(number))


def piece(parameter: Tensor) -> Tensor:
    """This rank's piece of a parameter at stage 3, flat and padded."""
    found: Tensor = DEEPSPEED.of(parameter, "ds_tensor").view(-1)
    return found


def piece_numel(parameter: Tensor) -> int:
    """The length of every rank's piece, padding included."""
    return int(DEEPSPEED.of(parameter, "partition_numel")())


# Experts, of DeepSpeed's own layers and of others', that are marked alike.


def expert_group(parameter: Tensor) -> str | None:
    """The name of an expert parameter's group, None for a parameter that all data-parallel ranks share."""
    return str(DEEPSPEED.of(parameter, "group_name")) if marks.is_expert(parameter) else None


def has_unknown_group(parameter: Tensor) -> bool:
    """Whether a parameter is marked as an expert's, without a group among whose ranks experts lie."""
    return marks.is_expert(parameter) and not hasattr(parameter, "group_name")


def expert_rank(group: str) -> int:
    """This rank's number among those that hold one replica of all experts together."""
    from deepspeed.utils import groups

    return int(groups._get_expert_parallel_rank(group))


def mark_as_having_experts(engine: Any) -> None:
    """Has an engine average and save experts apart, as it does where it finds layers of `deepspeed.moe` itself.

    It takes no others for such layers.
    """
    engine.has_moe_layers = True


def enter_experts(parameters: Sequence[nn.Parameter], parallel: dist.ProcessGroup, replicas: dist.ProcessGroup) -> str:
    """Has DeepSpeed know among which ranks the experts of another framework lie.

    It takes groups that it did not make under no name. So they are entered where it looks, under the name that it
    gives groups of that size, and every parameter is marked with that.

    Args:
        parameters: the experts', marked as such.
        parallel: the ranks that hold one replica of all experts together.
        replicas: those that hold the same ones.

    Returns:
        The name.
    """
    from deepspeed.utils import groups

    name = f"ep_size_{dist.get_world_size(parallel)}"
    groups._EXPERT_PARALLEL_GROUP[name] = parallel
    groups._EXPERT_DATA_PARALLEL_GROUP[name] = replicas
    if DEEPSPEED.release() >= (0, 17, 1):
        groups._EXPERT_PARALLEL_GROUP_RANKS[name] = dist.get_process_group_ranks(parallel)
        groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = dist.get_process_group_ranks(replicas)
    for parameter in parameters:
        setattr(parameter, "group_name", name)  # noqa: B010
    return name
