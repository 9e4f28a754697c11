"""What a preconditioner is: the type that the step, the root threads and checkpoints use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from ds_shampoo.algorithm.blocks import Block


class Preconditioner(Protocol):
    """What a stack of `n` equal-shaped blocks must offer. Slot i of every tensor belongs to `blocks[i]`.

    Statistics and roots are tensors of the stack, so that the root threads, checkpoints and metrics need not know whose
    they are. One that needs other roots of its statistics says so by `root_order`.

    Attributes:
        blocks: the stack's, all of one shape.
        factors: the statistics, one tensor per preconditioned dimension, in the order of `Block.preconditioned`: packed
            lower triangles [n, packed_numel(d)] fp32.
        roots: likewise, [n, d, d] of the dtype in which roots are kept.
        previous: the gradients that the statistics took in last, [n, *shape] fp32, where these are of differences; else
            there are none.
        updates: how often each slot's statistics were updated.
        ready: whether each slot's roots are all in force.
        directed: whether each slot has a direction: its roots are in force, or it moves without them too.
        root_order: p of the roots A^(-1/p).
    """

    blocks: tuple[Block, ...]
    factors: list[Tensor]
    roots: list[Tensor]
    previous: list[Tensor]
    updates: list[int]
    ready: list[bool]

    @property
    def root_order(self) -> float: ...

    @property
    def directed(self) -> list[bool]: ...

    def restart(self, slot: int) -> None:
        """Puts the slot back to where it was built."""

    def restart_statistics(self, slot: int) -> None:
        """Forgets the slot's gradients; what is in force stays."""

    def drop_root(self, slot: int, factor: int) -> None:
        """Puts the identity in a root's place; the slot is not ready."""

    def update(self, grads: Tensor, slots: Sequence[int], beta: float) -> None:
        """Folds block gradients [n, *shape], or what has changed of them, into the statistics of `slots`."""

    def apply(self, vectors: Tensor, scratch: Tensor) -> Tensor:
        """The directions for vectors [n, *shape], in either of the two tensors, which are both overwritten.

        Those of slots that aren't `directed` mean nothing.
        """

    def block_state(self, slot: int) -> dict[str, Any]:
        """Plain tensors, views of the present state, and numbers: `load_block_state` restores the slot bit for bit."""

    def check_block_state(self, slot: int, state: Mapping[str, Any]) -> None:
        """Whether `load_block_state` would take the state.

        Raises:
            ValueError: naming the block and what is missing or does not fit.
        """

    def load_block_state(self, slot: int, state: Mapping[str, Any]) -> None:
        """Takes back what `block_state` gave, or raises as `check_block_state` does and changes nothing."""
