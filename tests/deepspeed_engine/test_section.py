"""The optimizer section of a DeepSpeed config, and the flags beside it: nothing in there is passed over silently."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ds_shampoo
from ds_shampoo import SettingsError
from ds_shampoo.frameworks.deepspeed.section import check_config, complete, names_shampoo
from tests.distributed.jobs import SHAMPOO, build_model, engine_config, engine_of
from tests.distributed.pool import WorkerPool

Pools = Callable[[int], WorkerPool]


@pytest.mark.parametrize("value", [[], ["Shampoo"], "Shampoo", 5, True, [{"type": "Shampoo"}]])
def test_a_section_that_is_none(value: Any) -> None:
    with pytest.raises(SettingsError, match=r"^optimizer = .*: must be an object, as "):
        ds_shampoo.initialize(model=build_model(), config={"optimizer": value})


@pytest.mark.parametrize("value", [[], [1], "lr", 0, False, [["lr", 0.1]]])
def test_params_that_are_none(value: Any) -> None:
    with pytest.raises(SettingsError, match=r"^optimizer.params = .*: must be an object, as "):
        ds_shampoo.initialize(model=build_model(), config={"optimizer": {"type": "Shampoo", "params": value}})


@pytest.mark.parametrize("value", [5, ["Shampoo"], {"name": "Shampoo"}])
def test_a_type_that_is_no_string(value: Any) -> None:
    with pytest.raises(SettingsError, match=r"^optimizer.type = .*: must be a string"):
        ds_shampoo.initialize(model=build_model(), config={"optimizer": {"type": value}})


@pytest.mark.parametrize(
    "name", ["shampoo", "SHAMPOO", "DistributedShampoo", "Distributed_Shampoo", "shampo", "Champoo", "ds-shampoo"]
)
def test_other_spellings_get_a_hint(name: str) -> None:
    with pytest.raises(SettingsError, match=f'^optimizer.type = "{name}": did you mean "Shampoo"'):
        ds_shampoo.initialize(model=build_model(), config={"optimizer": {"type": name}})


@pytest.mark.parametrize("name", ["Adam", "AdamW", "Muon", "SGD", "Lamb", "OneBitAdam", "SOAP"])
def test_other_optimizers_are_none_of_ours(name: str) -> None:
    assert not names_shampoo({"optimizer": {"type": name, "lr": 1}})


@pytest.mark.parametrize("key", ["lr", "weight_decay", "parms", "Params", "freeze_step", "name"])
def test_a_key_beside_params(key: str) -> None:
    config = {"optimizer": {"type": "Shampoo", key: 0.1}}
    with pytest.raises(SettingsError, match=rf"^optimizer.{key} = 0.1: nobody reads that"):
        ds_shampoo.initialize(model=build_model(), config=config)


@pytest.mark.parametrize("key", ["lr", "betas", "block_size", "root_delay"])
def test_an_auto_that_nobody_filled_in(key: str) -> None:
    config = {"optimizer": {"type": "Shampoo", "params": {key: "auto"}}}
    with pytest.raises(SettingsError, match=rf"^Shampoo setting '{key}' = \"auto\": nobody has filled it in"):
        ds_shampoo.initialize(model=build_model(), config=config)


def test_what_may_stand_there() -> None:
    check_config({"optimizer": {"type": "Shampoo", "params": {"lr": 0.1}, "legacy_fusion": False}})
    check_config({"optimizer": {"type": "Shampoo", "params": None}})
    check_config({"optimizer": {"type": "Shampoo", "params": {"root_cores": "auto"}}})
    check_config({"optimizer": {"type": "Shampoo"}})
    assert not names_shampoo({})
    assert not names_shampoo({"optimizer": None})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, ""),
        ({"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}, ""),
        ({"zero_force_ds_cpu_optimizer": True}, "zero_force_ds_cpu_optimizer = True in the config does not hold"),
        ({"zero_allow_untested_optimizer": False}, "zero_allow_untested_optimizer = False in the config does not hold"),
    ],
)
def test_flags_that_are_overridden(caplog: pytest.LogCaptureFixture, given: dict[str, Any], said: str) -> None:
    config = dict(given)
    with caplog.at_level(logging.WARNING, "ds_shampoo"):
        complete(config)
    assert config == {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
    assert (said in caplog.text) if said else not caplog.text


def by_import(change: dict[str, Any], beside: dict[str, Any]) -> tuple[str, list[str]]:
    """What an engine that finds Shampoo by its import alone is refused with, and what is logged."""
    config = {**engine_config(SHAMPOO, 1, 1), **change}
    config["optimizer"] |= beside
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    listener = Listener()
    logging.getLogger("ds_shampoo").addHandler(listener)
    try:
        with engine_of(config, plain=True):
            return "", said
    except SettingsError as error:
        return str(error), said
    finally:
        logging.getLogger("ds_shampoo").removeHandler(listener)


def test_by_import_alone(pools: Pools) -> None:
    ((refused, _),) = pools(1).run(by_import, {}, {"lr": 0.5})
    assert refused.startswith("optimizer.lr = 0.5: nobody reads that")
    ((refused, said),) = pools(1).run(by_import, {"zero_force_ds_cpu_optimizer": True}, {"legacy_fusion": False})
    assert not refused
    assert any("zero_force_ds_cpu_optimizer = True in the config does not hold" in line for line in said)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"optimizer": {"type": "Shampoo", "params": {"lr": 0.1, "lr": 0.2}}}')
    with pytest.raises(SettingsError, match="more than one 'lr' in one object"):
        ds_shampoo.initialize(model=build_model(), config=str(path))
