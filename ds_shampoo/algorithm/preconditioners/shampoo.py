"""Shampoo's preconditioner: one Kronecker factor and one inverse root per dimension (paper, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_shampoo.algorithm.blocks import Block
from ds_shampoo.algorithm.precision import in_force
from ds_shampoo.algorithm.products import multiply
from ds_shampoo.algorithm.statistics import accumulate
from ds_shampoo.algorithm.triangle import packed_numel

# Roots of another dtype than the products' are converted for them, so many elements at a time: 16 MiB in fp32.
_CONVERTED_AT_ONCE = 2**22


class ShampooPreconditioner:
    """A Kronecker factor and an inverse root per preconditioned dimension; roots of order twice their number.

    Args:
        device: of all tensors.
        root_dtype: in which roots are kept.
        differences: statistics are of the difference of a gradient and the one before, which keeps the gradient.
    """

    needs_roots = True  # momentum alone is no direction for Adam's length

    def __init__(
        self,
        blocks: Sequence[Block],
        device: torch.device,
        root_dtype: torch.dtype = torch.float32,
        differences: bool = False,
    ) -> None:
        self.blocks = tuple(blocks)
        count, dims = len(blocks), blocks[0].factor_dims
        self.factors = [torch.zeros(count, packed_numel(dim), dtype=torch.float32, device=device) for dim in dims]
        self.roots = [torch.eye(dim, dtype=root_dtype, device=device).repeat(count, 1, 1) for dim in dims]
        kept = 1 if differences else 0
        self.previous = [torch.zeros(count, *blocks[0].shape, dtype=torch.float32, device=device) for _ in range(kept)]
        self.updates = [0] * count
        self.ready = [False] * count

    @property
    def root_order(self) -> float:
        """Twice the number of factors."""
        return 2 * len(self.factors)

    @property
    def directed(self) -> list[bool]:
        """Where roots are needed, those that have them."""
        return self.ready if self.needs_roots else [True] * len(self.blocks)

    def restart(self, slot: int) -> None:
        self.restart_statistics(slot)
        for factor in range(len(self.roots)):
            self.drop_root(slot, factor)

    def drop_root(self, slot: int, factor: int) -> None:
        self.roots[factor][slot].zero_().diagonal().fill_(1.0)
        self.ready[slot] = False

    def restart_statistics(self, slot: int) -> None:
        for tensor in (*self.factors, *self.previous):
            tensor[slot].zero_()
        self.updates[slot] = 0

    def update(self, grads: Tensor, slots: Sequence[int], beta: float) -> None:
        """L <- b L + w G Gᵀ along every preconditioned dimension (paper, Algorithm 1), G a gradient or a difference."""
        if not slots:
            return
        for slot in slots:
            self.updates[slot] += 1
        if len(slots) == len(self.blocks):
            self._fold_in(grads, self.factors, self.previous, beta)
            return
        chosen = torch.tensor(slots, dtype=torch.int64, device="cpu").to(grads.device, non_blocking=True)
        factors, previous = ([tensor[chosen] for tensor in tensors] for tensors in (self.factors, self.previous))
        self._fold_in(grads[chosen], factors, previous, beta)
        for whole, part in zip((*self.factors, *self.previous), (*factors, *previous), strict=True):
            whole[chosen] = part

    def _fold_in(self, grads: Tensor, factors: Sequence[Tensor], previous: Sequence[Tensor], beta: float) -> None:
        folded = grads
        for kept in previous:
            folded = torch.sub(grads, kept, out=kept)
        for factor, dim in zip(factors, self.blocks[0].preconditioned, strict=True):
            accumulate(factor, folded, dim, beta)
        for kept in previous:
            kept.copy_(grads)

    def apply(self, vectors: Tensor, scratch: Tensor) -> Tensor:
        """Multiplies each preconditioned dimension by its inverse root, in the vectors' dtype; a matrix: X_L V X_R."""
        for root, dim in zip(self.roots, self.blocks[0].preconditioned, strict=True):
            for slots in _converted_together(root, vectors.dtype):
                mode_product(root[slots].to(vectors.dtype), vectors[slots], dim, scratch[slots])
            vectors, scratch = scratch, vectors
        return vectors

    def apply_reshaped(
        self, vectors: Tensor, scratch: Tensor, reshape: Callable[[Tensor, Tensor], None]
    ) -> tuple[Tensor, Tensor]:
        """What becomes of the directions' spectra, and a tensor to spare: the two given ones, in either order.

        Under a `matmul_precision` of "medium" whitening and reshaping are in bfloat16. That rounds a root as keeping it
        in bfloat16 would.

        Args:
            vectors, scratch: as for `apply`.
            reshape: from matrices [n, rows, columns] in fp32 or bfloat16, which it overwrites, to fp32; those of blocks
                of more than two dimensions are their first against the others.
        """
        count, rows = len(vectors), self.blocks[0].matrix_shape[0]
        if in_force() == "medium":
            narrow, spare = scratch.view(-1).view(torch.bfloat16).view(2, *vectors.shape)
            whitened = ShampooPreconditioner.apply(self, narrow.copy_(vectors), spare)
            other, left = vectors, scratch
        else:
            whitened = ShampooPreconditioner.apply(self, vectors, scratch)
            other, left = (scratch, vectors) if whitened is vectors else (vectors, scratch)
        reshape(whitened.view(count, rows, -1), other.view(count, rows, -1))
        return other, left

    def block_state(self, slot: int) -> dict[str, Any]:
        previous = {"previous": [tensor[slot] for tensor in self.previous]} if self.previous else {}
        return {
            **previous,
            "factors": [factor[slot] for factor in self.factors],
            "roots": [root[slot] for root in self.roots],
            "updates": self.updates[slot],
            "ready": self.ready[slot],
        }

    def check_block_state(self, slot: int, state: Mapping[str, Any]) -> None:
        missing = [name for name in ("factors", "roots", "updates", "ready") if name not in state]
        if missing:
            raise ValueError(f"block {self.blocks[slot]}: the checkpoint lacks {', '.join(missing)}")
        for name, own in self._saved(state):
            saved = [tuple(tensor.shape) for tensor in state[name]]
            if saved != [tuple(tensor.shape[1:]) for tensor in own]:
                raise ValueError(
                    f"the {name} of block {self.blocks[slot]} have the shapes {saved} in the checkpoint, but "
                    f"{[tuple(tensor.shape[1:]) for tensor in own]} here: another block_size, model or release"
                )
        if int(state["updates"]) < 0:
            raise ValueError(f"block {self.blocks[slot]}: {state['updates']} updates in the checkpoint; 0 or more do")

    def load_block_state(self, slot: int, state: Mapping[str, Any]) -> None:
        self.check_block_state(slot, state)
        for name, own in self._saved(state):
            for tensor, value in zip(own, state[name], strict=True):
                tensor[slot].copy_(value)
        self.updates[slot] = int(state["updates"])
        self.ready[slot] = bool(state["ready"])
        if not state.get("previous"):
            for tensor in self.previous:
                tensor[slot].zero_()

    def _saved(self, state: Mapping[str, Any]) -> Iterator[tuple[str, list[Tensor]]]:
        """What is taken from a state; statistics of gradients have no previous one, and it may go on without."""
        yield from (("factors", self.factors), ("roots", self.roots))
        if self.previous and state.get("previous"):
            yield "previous", self.previous


def _converted_together(root: Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """Slots [n, d, d] by as many as their products take at once: all of those that need no converting.

    Of others one on a CPU, where fresh memory costs more than a call.
    """
    count = len(root)
    most = _CONVERTED_AT_ONCE if root.device.type != "cpu" else 0
    together = count if root.dtype == dtype else max(1, most // root[0].numel())
    for first in range(0, count, together):
        yield slice(first, first + together)


def mode_product(matrix: Tensor, stacked: Tensor, dim: int, out: Tensor) -> None:
    """Multiplies dimension `dim` of stacked blocks [n, d_0, .., d_k] by symmetric matrices [n, d_dim, d_dim].

    `stacked` and `out` are contiguous and of one shape, and distinct.
    """
    shape = stacked.shape
    count, before, order = shape[0], shape[1 : dim + 1].numel(), shape[dim + 1]
    if before == 1:
        multiply(matrix, stacked.view(count, order, -1), out.view(count, order, -1))
    elif dim + 2 == len(shape):
        multiply(stacked.view(count, before, order), matrix, out.view(count, before, order))
    else:
        torch.matmul(
            matrix.unsqueeze(1), stacked.view(count, before, order, -1), out=out.view(count, before, order, -1)
        )
