"""What a model or an mpu offers is found however it offers it: as a module, an object, or what passes on another's."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor, nn

from ds_shampoo.config import SettingsError
from ds_shampoo.frameworks import protocols

TENSOR_PARALLEL = {"get_tensor_model_parallel_world_size": lambda: 4, "get_tensor_model_parallel_rank": lambda: 3}
QUESTIONS = {
    "complete_settings": protocols.completes_settings,
    "shampoo_register": protocols.registers_model,
    "shampoo_prepare": protocols.prepares_model,
    "shampoo_name": protocols.names_parameters,
    "shampoo_sections": protocols.slices_parameters,
}


def module(**functions: Any) -> ModuleType:
    made = ModuleType("made")
    vars(made).update(functions)
    return made


class PassesOn:
    """As an mpu around another, which `isinstance` sees nothing of."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def passing_on(**functions: Any) -> ModuleType:
    """A module around another, as `ds_shampoo.megatron.mpu` around Megatron's."""
    return module(__getattr__=module(**functions).__getattribute__)


def holding(**functions: Any) -> Any:
    return type("Made", (), {name: staticmethod(function) for name, function in functions.items()})()


def around(**functions: Any) -> Any:
    return PassesOn(module(**functions))


def model(**functions: Any) -> nn.Module:
    made = nn.Linear(1, 1)
    vars(made).update(functions)
    return made


@pytest.mark.parametrize("make", [module, passing_on, holding, around, model])
@pytest.mark.parametrize("name", QUESTIONS)
def test_what_is_offered_is_found(make: Any, name: str) -> None:
    made = make(**{name: lambda *_: None}, **TENSOR_PARALLEL)
    assert {other for other, asks in QUESTIONS.items() if asks(made)} == {name}


@pytest.mark.parametrize("nothing", [None, module(), nn.Linear(1, 1), sys, PassesOn(None)])
def test_nothing_is_offered(nothing: Any) -> None:
    assert not any(asks(nothing) for asks in QUESTIONS.values())
    assert (protocols.slices(nothing), protocols.slice_rank(nothing), protocols.unknown_slices(nothing)) == (1, 0, 1)
    assert not protocols.sees_part_of_sequence(nothing)


@pytest.mark.parametrize("make", [module, passing_on, holding, around])
def test_known_slices(make: Any) -> None:
    mpu = make(shampoo_sections=lambda *_: None, get_model_parallel_world_size=lambda: 4, **TENSOR_PARALLEL)
    assert (protocols.slices(mpu), protocols.slice_rank(mpu), protocols.unknown_slices(mpu)) == (4, 3, 1)


@pytest.mark.parametrize("make", [module, passing_on, holding, around])
def test_unknown_slices(make: Any) -> None:
    sizes = {"get_model_parallel_world_size": lambda: 8}
    assert protocols.unknown_slices(make(**sizes)) == 8
    mpu = make(**sizes, get_slice_parallel_world_size=lambda: 2, **TENSOR_PARALLEL)
    assert (protocols.slices(mpu), protocols.slice_rank(mpu), protocols.unknown_slices(mpu)) == (1, 0, 2)


def test_half_an_offer_is_refused() -> None:
    mpu = module(shampoo_sections=lambda *_: None, get_tensor_model_parallel_rank=lambda: 0)
    with pytest.raises(SettingsError, match=r"it has shampoo_sections, and needs get_tensor_model_parallel_world_size"):
        protocols.slices_parameters(mpu)


def test_megatrons_mpu_offers_what_the_protocols_say() -> None:
    pytest.importorskip("megatron.core")
    from ds_shampoo.megatron import mpu

    offered = (protocols.RegistersModel, protocols.PreparesModel, protocols.SlicesParameters)
    assert protocols.registers_model(mpu)
    assert protocols.prepares_model(mpu)
    assert protocols.slices_parameters(mpu)
    assert not protocols.names_parameters(mpu)
    for protocol in offered:
        for name in protocols._methods(protocol):
            assert parameters(getattr(mpu, name)) == parameters(getattr(protocol, name))[1:]


def test_the_pipelines_ranks_offer_what_the_protocols_say() -> None:
    pytest.importorskip("megatron.core")
    from ds_shampoo.frameworks.megatron_deepspeed.pipeline import GPTPipeline, Ranks

    ranks = Ranks(module(**TENSOR_PARALLEL))
    assert protocols.names_parameters(ranks)
    assert protocols.slices_parameters(ranks)
    assert protocols.prepares_model(ranks)
    assert not protocols.registers_model(ranks)
    assert (protocols.slices(ranks), protocols.slice_rank(ranks)) == (4, 3)
    for holder, protocol in (
        (GPTPipeline, protocols.CompletesSettings),
        (GPTPipeline, protocols.NamesWholeModel),
        (Ranks, protocols.NamesParameters),
    ):
        for name in protocols._methods(protocol):
            assert parameters(getattr(holder, name)) == parameters(getattr(protocol, name))


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_types_are_those_of_real_arguments() -> None:
    class Slices:
        """A mpu as a user would write it."""

        def shampoo_sections(self, model: nn.Module, name: str, parameter: Tensor) -> None:
            return None

        def get_tensor_model_parallel_world_size(self) -> int:
            return 2

        def get_tensor_model_parallel_rank(self) -> int:
            return 1

    mpu: protocols.SlicesParameters = Slices()
    assert protocols.slices(mpu) == 2
