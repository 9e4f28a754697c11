"""What is known of every parameter before anything is built: its name on all ranks, its role, and whether it fits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ds_shampoo import accelerators
from ds_shampoo.algorithm import selection
from ds_shampoo.config import ShampooConfig
from ds_shampoo.parameters import patterns, wrappers
from ds_shampoo.sharding.partition import Layout, LogicalParameter


class Parameters:
    """Reads a model, and makes logical parameters of what its user passes.

    Attributes:
        model_order: the ids of the model's parameters in its order; empty where no model is known.
        have_names: whether embeddings and heads can be told by more than the names that the user passes.
    """

    def __init__(self, model: nn.Module | None, layout: Layout, config: ShampooConfig) -> None:
        self._model, self._layout, self._config = model, layout, config
        self._names = selection.names(model) if model is not None else {}
        self._kinds = selection.kinds(model) if model is not None else {}
        self._aliases = selection.aliases(model) if model is not None else {}
        self.model_order = tuple(self._names)
        self.have_names = bool(self._aliases)

    def logical(self, member: Any, excluded: bool, position: int) -> LogicalParameter:
        """What a parameter, or a (name, parameter) pair, is.

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
        unfit = wrappers.check_parameter(own_name, tensor)
        accelerators.check_parameter(own_name, tensor)
        name, shape = self._layout.name(own_name, tensor), selection.full_shape(tensor)
        found = self._kinds.get(id(tensor)) or selection.name_kind(name, tensor)
        known_as = patterns.Named((*self._aliases.get(id(tensor), ()), own_name, name), shape)
        kind = patterns.overruled(self._config, known_as, found)
        return LogicalParameter(
            name,
            tensor,
            shape,
            kind.role,
            excluded,
            self._layout.sections(own_name, tensor),
            unfit,
            vocabulary_dim=kind.vocabulary_dim,
            batch=kind.batch,
        )

    def check_patterns(self, groups: Iterable[Iterable[LogicalParameter]]) -> None:
        """Holds the settings' name patterns against all names, on all ranks together.

        Raises:
            SettingsError: for a pattern that means nothing.
        """
        named = patterns.named(self._model, groups, self._layout)
        patterns.check(self._config, named, self._layout.over_ranks)
