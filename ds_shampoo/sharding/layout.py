"""Layout: what a host framework did to the parameters, as fragments; the default is one process with whole ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from ds_shampoo.algorithm.blocks import Section
from ds_shampoo.sharding.model_order import Rounds
from ds_shampoo.sharding.partition import LogicalParameter, Partition, whole_fragments

_Said = TypeVar("_Said")


class Layout(ABC):
    """Turns what a host framework did to the parameters into fragments; one subclass per way of doing it.

    A framework steps a param group whole, or in parts that it calls `step` for one after the other (ZeRO-3's
    sub-groups); `stand_ins` is what stands in the group at such a step. What a subclass does not override holds for a
    single process.

    Attributes:
        keeps_blocks_apart: the framework's checkpoints have the blocks in files of their own, outside `state_dict`.
        alone: nobody lays the parameters out, so that several ranks' optimizers would share no work.
        steps_empty: a group that lies on other ranks only is stepped all the same, since this one may own its blocks.
    """

    alone: bool = False
    keeps_blocks_apart: bool = False
    steps_empty: bool = False

    def in_training(self) -> bool:
        """False while the framework calls `step` only to have state allocated, as DeepSpeed does in set-up."""
        return True

    def check_step(self) -> None:  # noqa: B027  # one process takes every step
        """Refuses a step that the ranks can't take together; before anything of it."""

    def check_gradients(self) -> None:  # noqa: B027  # ranks that share nothing have nothing to compare
        """Refuses gradients that are not what they should be, once blocks are built and before a step takes them.

        Raises:
            RuntimeError: naming the parameter.
        """

    def check_alike(self, own: Mapping[str, object]) -> None:  # noqa: B027  # and is like itself
        """Holds what has to be the same on all ranks against the other ranks'; all ranks ask at once."""

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what a rank may refuse: where one does, all do."""
        yield

    def device(self, parameter: Tensor) -> torch.device:
        """Where blocks are kept and preconditioned: that of the model's compute, wherever shards lie."""
        return parameter.device

    def name(self, name: str, parameter: Tensor) -> str:
        """A parameter's name among those of all ranks, from its name in this rank's model."""
        return name

    def sections(self, name: str, parameter: Tensor) -> Sequence[Section] | None:
        """The sections of a matrix of which this rank may hold a slice only; None for what every rank has whole."""
        return None

    def over_ranks(self, own: Sequence[_Said]) -> Sequence[_Said]:
        """What every rank of the job says, where ranks have different parts of the model; all ranks ask at once."""
        return own

    def everyones(self, rounds: Rounds) -> Rounds:
        """This rank's blocks together with those that other ranks have, in the model's order; all ranks ask at once."""
        return rounds

    def parts(self, index: int) -> Sequence[Tensor] | None:
        """The tensors that stand for a param group, each stepped by itself; None where it is stepped whole.

        Args:
            index: the group's, among those that have parameters.
        """
        return None

    def absent(self, tensor: Tensor) -> bool:
        """Whether a tensor that is stepped has been moved out of memory until its step."""
        return False

    def members(self, originals: Sequence[LogicalParameter], stand_ins: Sequence[Tensor]) -> Sequence[LogicalParameter]:
        """Those of a param group's original parameters that `stand_ins` stands for."""
        return originals

    @abstractmethod
    def partition(self, members: Sequence[LogicalParameter], stand_ins: Sequence[Tensor]) -> Partition:
        """Maps original parameters to the tensors that stand for them.

        Raises:
            RuntimeError: if the two can't be brought together; training would go wrong without a sign.
        """


class WholeLayout(Layout):
    """One process, every parameter whole: Shampoo as an ordinary torch optimizer."""

    alone = True

    def partition(self, members: Sequence[LogicalParameter], stand_ins: Sequence[Tensor]) -> Partition:
        if [id(parameter.tensor) for parameter in members] != [id(tensor) for tensor in stand_ins]:
            raise RuntimeError(
                "the parameters of a param group were replaced after Shampoo was constructed; under DeepSpeed "
                "select Shampoo in the JSON's optimizer section, or call ds_shampoo.initialize"
            )
        return Partition(whole_fragments(members, rank=0))
