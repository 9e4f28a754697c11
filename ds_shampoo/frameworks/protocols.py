"""What a model, and the `mpu` of an engine, may offer to Shampoo under DeepSpeed; both are others' objects or modules.

Each Protocol has a question below it. Nothing need inherit from a Protocol, and an `mpu` may be a module of functions,
or pass on what it does not have: so the questions look names up, where `isinstance` would leave out from Python 3.12
on what an object passes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeGuard

from torch import Tensor, nn

from ds_shampoo.algorithm.blocks import Section
from ds_shampoo.config import SettingsError

# What a model may offer.


class CompletesSettings(Protocol):
    """A model that sets in DeepSpeed's config what it needs itself, as GPTPipeline."""

    def complete_settings(self, settings: dict[str, Any]) -> None:
        """Sets it, in place; `ds_shampoo.initialize` calls this first of all, with a copy of the user's config.

        Raises:
            SettingsError: if the config says otherwise.
        """


def completes_settings(model: object) -> TypeGuard[CompletesSettings]:
    return _has(model, CompletesSettings)


class NamesWholeModel(Protocol):
    """A part of a model, as a pipeline stage, that knows the names in the whole; its own `mpu` asks it."""

    def whole_model_name(self, name: str) -> str:
        """The name in the undivided model of the parameter that is called `name` in this part."""


class SeesPartOfSequence(Protocol):
    """A model whose tensor-parallel ranks may hold different parts of an activation, as GPTPipeline."""

    sequence_parallel: bool
    """Whether they do; asked when an engine is set up, to refuse pipelines that would send one rank's part on."""


def sees_part_of_sequence(model: object) -> bool:
    return bool(getattr(model, "sequence_parallel", False))


# What an mpu may offer.


class RegistersModel(Protocol):
    """An mpu that has something to tell DeepSpeed of a model, as which ranks share an expert."""

    def shampoo_register(self, model: nn.Module) -> None:
        """Tells it; `ds_shampoo.initialize` calls this before DeepSpeed has the model.

        Raises:
            ValueError: for a model that can't be trained so.
        """


def registers_model(mpu: object) -> TypeGuard[RegistersModel]:
    return _has(mpu, RegistersModel)


class PreparesModel(Protocol):
    """An mpu whose models need something before they are trained under DeepSpeed, as sums of their gradients."""

    def shampoo_prepare(self, model: nn.Module) -> None:
        """Does it; called when an engine that Shampoo is to train is set up, whichever way it came in."""


def prepares_model(mpu: object) -> TypeGuard[PreparesModel]:
    return _has(mpu, PreparesModel)


class NamesParameters(Protocol):
    """An mpu that knows what a parameter is called in the undivided model, as that of a pipeline."""

    def shampoo_name(self, model: Any, name: str) -> str:
        """The name of the parameter that is called `name` in this rank's part; asked once for each, at the start."""


def names_parameters(mpu: object) -> TypeGuard[NamesParameters]:
    return _has(mpu, NamesParameters)


class SlicesParameters(Protocol):
    """An mpu that knows which matrices are sliced over tensor-parallel ranks, and where; one without has none."""

    def shampoo_sections(self, model: nn.Module, name: str, parameter: Tensor) -> Sequence[Section] | None:
        """The sections of the whole matrix of which a parameter is this rank's slice; asked once, at the start.

        Args:
            model: the engine's.
            name: the parameter's in it.

        Returns:
            None for what is whole on every rank.

        Raises:
            ValueError: for a parameter that does not fit the rule.
        """

    def get_tensor_model_parallel_world_size(self) -> int:
        """Over how many ranks; checkpoints record it, and normalised grafting is refused where there are several."""

    def get_tensor_model_parallel_rank(self) -> int:
        """This rank's number among them, by which checkpoints tell the slices of an expert apart."""


def slices_parameters(mpu: object) -> TypeGuard[SlicesParameters]:
    """Whether it does.

    Raises:
        SettingsError: for one that gives sections, and does not say how many ranks there are.
    """
    if not hasattr(mpu, "shampoo_sections"):
        return False
    missing = [name for name in _methods(SlicesParameters) if not hasattr(mpu, name)]
    if missing:
        raise SettingsError(f"mpu = {mpu!r}: it has shampoo_sections, and needs {' and '.join(missing)} with it")
    return True


def slices(mpu: object) -> int:
    """The tensor-parallel size, where Shampoo knows the slices; else 1."""
    return int(mpu.get_tensor_model_parallel_world_size()) if slices_parameters(mpu) else 1


def slice_rank(mpu: object) -> int:
    """This rank's number among the tensor-parallel ones, where Shampoo knows the slices; else 0."""
    return int(mpu.get_tensor_model_parallel_rank()) if slices_parameters(mpu) else 0


class DividesModel(Protocol):
    """Any mpu of DeepSpeed's: it knows over how many ranks one replica of a model lies."""

    def get_model_parallel_world_size(self) -> int:
        """So many, pipeline stages included; several are refused, where the mpu does not say how they slice."""


class DividesLayers(Protocol):
    """An mpu that counts the ranks that slice a layer apart from pipeline stages, as DeepSpeed's grid."""

    def get_slice_parallel_world_size(self) -> int:
        """Over how many ranks a layer is sliced; asked in place of `get_model_parallel_world_size`."""


def unknown_slices(mpu: object) -> int:
    """Over how many ranks an mpu slices layers without saying how; 1 where it says how, or slices none."""
    if slices_parameters(mpu):
        return 1
    for protocol in (DividesLayers, DividesModel):
        (name,) = _methods(protocol)
        size = getattr(mpu, name, None)
        if callable(size):
            return int(size())
    return 1


def _has(thing: object, protocol: type) -> bool:
    return all(hasattr(thing, name) for name in _methods(protocol))


def _methods(protocol: type) -> Iterator[str]:
    return (name for name in vars(protocol) if not name.startswith("_"))
