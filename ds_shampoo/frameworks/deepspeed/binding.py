"""How a Shampoo becomes an engine's optimizer, whichever way it comes in, and what is said where one does not."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ds_shampoo.config import SettingsError
from ds_shampoo.frameworks import protocols
from ds_shampoo.frameworks.deepspeed import experts, internals
from ds_shampoo.frameworks.deepspeed.checkpoint import attach
from ds_shampoo.frameworks.deepspeed.layouts import EngineLayout, layout_for
from ds_shampoo.frameworks.deepspeed.monitor import MonitorFeed
from ds_shampoo.frameworks.deepspeed.section import TYPE, config_of
from ds_shampoo.frameworks.deepspeed.support import (
    refuse_factors_of_tied_layers,
    refuse_norms_of_slices,
    refuse_tied_layers_of_several_roles,
    refuse_unsupported,
)
from ds_shampoo.optimizer import Shampoo, unbound
from ds_shampoo.parameters.members import tensors_in

logger = logging.getLogger("ds_shampoo")


def prepare(engine: Any) -> None:
    """What comes before an engine's Shampoo is made, or taken on: a wrong feature is refused, the model made ready.

    Raises:
        SettingsError: for a DeepSpeed feature under which Shampoo can't run yet.
    """
    log_to_stdout()
    refuse_unsupported(engine)
    if protocols.prepares_model(engine.mpu):
        engine.mpu.shampoo_prepare(engine.module)


def take_on_object(engine: Any, optimizer: Shampoo) -> None:
    """Makes a Shampoo that the user made the optimizer of an engine, which has none yet.

    Raises:
        SettingsError: as `prepare` and `take_on`, if another engine trains with it, and where experts need param
            groups that it does not have.
    """
    layout = optimizer.layout
    if isinstance(layout, EngineLayout) and layout.in_training():
        raise SettingsError("the Shampoo object is the optimizer of another engine: make one for each")
    prepare(engine)
    experts.tell_of_experts(engine)
    experts.check_groups(optimizer.param_groups)
    take_on(engine, optimizer)


def take_on(engine: Any, optimizer: Shampoo) -> None:
    """Makes a Shampoo the optimizer of an engine, before DeepSpeed wraps it.

    Names and modules are the engine's, and so is the layout. The engine's own `save_checkpoint` and `load_checkpoint`
    take the blocks along from then on, and its monitor gets the metrics.

    Raises:
        SettingsError: as `Shampoo.bind`, and for a setting that the engine's parallelism does not allow.
    """
    refuse_factors_of_tied_layers(engine, optimizer.param_groups)
    refuse_norms_of_slices(engine, optimizer.param_groups)
    if engine.zero_optimization():
        for group in optimizer.param_groups:
            _put_floats_first(group["params"])
    optimizer.bind(engine.module, layout_for(engine))
    refuse_tied_layers_of_several_roles(engine, optimizer.roles())
    optimizer.register_step_post_hook(MonitorFeed(engine))
    attach(engine, optimizer)


def made_for(members: Iterable[Any]) -> list[Shampoo]:
    """The Shampoo objects that no framework has laid out, and that were made for some of these parameters.

    To be asked before DeepSpeed puts tensors of its own into param groups, which others' optimizers may share.

    Args:
        members: parameters, (name, parameter) pairs or param groups.
    """
    own = {id(parameter) for parameter in tensors_in(members)}
    return [each for each in unbound if any(id(parameter) in own for parameter in tensors_in(each.param_groups))]


def finish(engine: Any, made_for_them: Iterable[Shampoo]) -> None:
    """What is done once DeepSpeed has put an engine's optimizer in place: a Shampoo's layout is held against the data.

    Args:
        made_for_them: the Shampoo objects that were made for what the engine trains.

    Raises:
        SettingsError: if the engine has a Shampoo that was not taken on.
        RuntimeError: if the layout is not what the data says.
    """
    optimizer = internals.inner_optimizer(engine)
    _say_which_optimizer_holds(engine)
    if isinstance(optimizer, Shampoo):
        layout = optimizer.layout
        if not isinstance(layout, EngineLayout) or not layout.is_of(engine):
            raise SettingsError(
                f"DeepSpeed made a {type(optimizer).__name__} that Shampoo does not know of: name it "
                '"optimizer": {"type": "Shampoo"} in the config, or pass it as optimizer='
            )
        optimizer.prepare()
    if any(each in unbound for each in made_for_them) and not engine.global_rank:
        _say_what_is_not_used(optimizer)


def log_to_stdout() -> None:
    """Shows the package's messages in a DeepSpeed job, whose launcher collects stdout, unless logging is set up."""
    package = logging.getLogger("ds_shampoo")
    if package.handlers or logging.getLogger().handlers:
        return
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("[%(asctime)s] [%(levelname)s] [ds_shampoo] %(message)s"))
    package.addHandler(handler)
    package.setLevel(logging.INFO)


def _put_floats_first(parameters: list[Tensor]) -> None:
    """Puts integers, as quantised weights are, behind what is trained.

    ZeRO takes the first parameter's dtype for everyone's, and would round all gradients to bytes.
    """
    parameters.sort(key=lambda parameter: not parameter.is_floating_point())


def _say_which_optimizer_holds(engine: Any) -> None:
    """Logs a warning, on the first rank, where one was passed and the config names another; one is Shampoo."""
    section, optimizer = config_of(engine).get("optimizer"), internals.inner_optimizer(engine)
    if not isinstance(section, Mapping) or engine.global_rank:
        return
    concerned = isinstance(optimizer, Shampoo) or section.get("type") == TYPE
    if concerned and internals.given_optimizer(engine) is not None:
        log_to_stdout()
        logger.warning(
            'optimizer = {"type": "%s", ...} in the config does not hold: the engine trains with the %s that was '
            "passed as optimizer=",
            section.get("type"), type(optimizer).__name__,
        )  # fmt: skip


def _say_what_is_not_used(optimizer: Any) -> None:
    """Logs a warning that another optimizer trains what a Shampoo was made for."""
    log_to_stdout()
    logger.warning(
        "a Shampoo object was made for parameters that this DeepSpeed engine trains with %s: the object trains "
        'nothing. Pass it as optimizer= of deepspeed.initialize, or name it in the config: "optimizer": {"type": '
        '"Shampoo", "params": {...}}. Hugging Face\'s Trainer takes no object beside DeepSpeed (optimizers=), and '
        "Accelerate puts DeepSpeedCPUAdam in its place under offload unless the config has "
        '"zero_force_ds_cpu_optimizer": false',
        type(optimizer).__name__,
    )
