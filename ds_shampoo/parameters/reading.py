"""What is known of every parameter before anything is built: its name on all ranks, its role, and whether it fits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ds_shampoo import accelerators
from ds_shampoo.algorithm import fused, selection
from ds_shampoo.algorithm.blocks import Parts
from ds_shampoo.algorithm.selection import Kind
from ds_shampoo.config import SettingsError, ShampooConfig
from ds_shampoo.parameters import marks, patterns, wrappers
from ds_shampoo.sharding.layout import Layout
from ds_shampoo.sharding.partition import LogicalParameter


class Parameters:
    """Reads a model, and makes logical parameters of what its user passes.

    Attributes:
        model: the module that they belong to; None where it is not known.
        layout: how a host framework lays them out.
        model_order: the ids of the model's parameters in its order; empty where no model is known.
        have_names: whether embeddings and heads can be told by more than the names that the user passes.
    """

    def __init__(self, model: nn.Module | None, layout: Layout, config: ShampooConfig) -> None:
        self.model, self.layout, self._config = model, layout, config
        self._patterns_hold = False
        self._sharding, self._looked_again = wrappers.sharding(model), False
        self._names = selection.names(model) if model is not None else {}
        self._reader = selection.Reader(marks.whole_shape, marks.is_embedding_or_head, marks.is_shared_embedding)
        self._kinds = selection.kinds(model, self._reader) if model is not None else {}
        self._aliases = selection.aliases(model) if model is not None else {}
        self._parts = fused.parts(model, self._reader) if model is not None else {}
        # What does not fit of the settings' patterns; None once all ranks have heard of it.
        self._misfits: list[str] | None = []
        self.model_order = tuple(self._names)
        self.have_names = bool(self._aliases)

    def group(
        self, members: Sequence[Any], group: Mapping[str, Any], before: Sequence[Sequence[LogicalParameter]]
    ) -> list[LogicalParameter]:
        """What the members of a new param group are.

        Args:
            members: parameters or (name, parameter) pairs.
            group: its other keys.
            before: the members of the groups before it.

        Raises:
            TypeError: as `logical`.
            SettingsError: as `logical`, and for a name that is used twice.
        """
        first, excluded = sum(map(len, before)), not group.get("preconditioned", True)
        found = [self.logical(member, excluded, first + number) for number, member in enumerate(members)]
        taken = {parameter.name for others in before for parameter in others}
        for parameter in found:
            if parameter.name in taken:
                raise SettingsError(f"parameter name '{parameter.name}' is used twice")
            taken.add(parameter.name)
        return found

    def logical(self, member: Any, excluded: bool, position: int) -> LogicalParameter:
        """What a parameter, or a (name, parameter) pair, is; None for the name stands for no name.

        Args:
            excluded: whether its param group says `preconditioned: false`.
            position: its number over all param groups, for one without a name.

        Raises:
            TypeError: for anything else.
            SettingsError: for a tensor that can't be trained as it is, or where it is.
        """
        name, tensor = member if isinstance(member, tuple) else (None, member)
        if not isinstance(tensor, Tensor):
            raise TypeError(f"Shampoo takes tensors or (name, tensor) pairs, not {type(tensor).__name__}")
        own_name = name or self._names.get(id(tensor), f"param_{position}")
        unfit = wrappers.check_parameter(own_name, tensor, self._sharding)
        accelerators.check_parameter(own_name, tensor)
        name, shape = self.layout.name(own_name, tensor), marks.whole_shape(tensor)
        found = self._kinds.get(id(tensor)) or selection.name_kind(name, tensor, self._reader)
        known_as = patterns.Named((*self._aliases.get(id(tensor), ()), own_name, name), shape)
        kind = patterns.overruled(self._config, known_as, found)
        sections = self.layout.sections(own_name, tensor)
        return LogicalParameter(
            name,
            tensor,
            shape,
            kind.role,
            excluded,
            sections,
            unfit,
            vocabulary_dim=kind.vocabulary_dim,
            batch=kind.batch,
            rank_dim=kind.rank_dim,
            parts=self._fused(known_as, kind, tensor, sliced=sections is not None),
        )

    def _fused(self, known_as: patterns.Named, kind: Kind, tensor: Tensor, *, sliced: bool) -> Parts | None:
        """The parts of a fused matrix; None for one that the layout cuts at its parts' borders itself."""
        try:
            if sliced:
                if patterns.asks_for_parts(self._config, known_as.names):
                    raise SettingsError(
                        f"Shampoo setting 'fused_parts' has a pattern for '{known_as.names[-1]}', which is cut as "
                        "Megatron slices and fuses it: leave it out"
                    )
                return None
            by_name = None if self._aliases else fused.parts_by_name(known_as.names[-1], known_as.shape)
            return patterns.parts(self._config, known_as, kind.batch, self._parts.get(id(tensor), by_name))
        except SettingsError as error:
            if self._misfits is None:
                raise
            self._misfits.append(str(error))
            return None

    def look_again(self, groups: Iterable[Iterable[LogicalParameter]]) -> None:
        """Looks once more, at the first step, for a wrapper that has sharded the parameters since.

        Raises:
            SettingsError: naming the first that it has.
        """
        if self._looked_again or self.layout.keeps_blocks_apart:
            return
        sharding = wrappers.sharding(self.model)
        for parameter in (parameter for group in groups for parameter in group):
            wrappers.check_parameter(parameter.name, parameter.tensor, sharding)
        self._looked_again = True

    def check_patterns(self, groups: Iterable[Iterable[LogicalParameter]]) -> None:
        """Holds the settings' name patterns against all names, on all ranks together; once they held, never again.

        Raises:
            SettingsError: for a pattern that means nothing.
        """
        if self._patterns_hold:
            return
        named = patterns.named(self.model, groups, self.layout)
        patterns.check(self._config, named, self.layout.over_ranks)
        if self._config.fused_parts:
            for misfit in self.layout.over_ranks(self._misfits or []):
                raise SettingsError(misfit)
        self._misfits, self._patterns_hold = None, True
