"""Norms of blocks and whole parameters whose elements lie over several ranks: partial sums and one all-reduce."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ds_shampoo.algorithm.blocks import Block
from ds_shampoo.algorithm.multi_tensor import kernels_for
from ds_shampoo.sharding.exchange import buffer_view, choose_sources
from ds_shampoo.sharding.fragments import Box, Fragment, Piece
from ds_shampoo.sharding.partition import Partition


class PieceNorms:
    """Sums of squares over this rank's pieces, by the ordinal of the segment they belong to."""

    def __init__(self, pieces: Sequence[Piece], segments: int, device: torch.device) -> None:
        self._pieces = [(piece.buffer, buffer_view(piece), piece.block) for piece in pieces]
        self._segments, self._device = segments, device
        self._ordinals = torch.tensor([piece.block for piece in pieces], dtype=torch.long, device=device)

    def squares(self, buffers: Sequence[Tensor | None]) -> Tensor:
        """[segments] fp32: what this rank's buffers add to each squared norm; an absent buffer adds nothing."""
        total = torch.zeros(self._segments, dtype=torch.float32, device=self._device)
        present = [i for i, (buffer, _, _) in enumerate(self._pieces) if buffers[buffer] is not None]
        if present:
            norms = kernels_for(self._device).norms([self._pieces[i][1].of(buffers) for i in present])
            ordinals = self._ordinals
            if len(present) < len(self._pieces):
                chosen = torch.tensor(present, dtype=torch.int64, device="cpu")
                ordinals = ordinals[chosen.to(self._device, non_blocking=True)]
            # In one order on an accelerator too, where index_add_ leaves that to chance.
            total.index_put_((ordinals,), norms.square(), accumulate=True)
        return total


class SegmentScaler:
    """Divides every block, and every parameter that has none, by its norm, for the normalised grafting methods."""

    def __init__(
        self,
        blocks: Sequence[Block],
        pieces: Sequence[Piece],
        owners: Sequence[int],
        *,
        whole: Sequence[Fragment],
        partition: Partition,
        device: torch.device,
    ) -> None:
        """`whole` are the fragments, on all ranks, of the parameters that are not preconditioned."""
        names = {fragment.parameter: len(blocks) + i for i, fragment in enumerate(_first_of_each(whole))}
        segments = list(blocks) + [Block(name, 0, (0,), (_extent(name, whole),), (), (0,)) for name in names]
        everywhere = list(pieces) + [
            Piece(names[f.parameter], f.rank, f.buffer, f.offset, (1,), Box((f.start,), (f.numel,))) for f in whole
        ]
        reducers = [*owners, *(fragment.rank for fragment in _first_of_each(whole))]
        sources = choose_sources(segments, everywhere, reducers)
        self._norms = PieceNorms([p for p in sources if p.rank == partition.rank], len(segments), device)
        self._mine = [(buffer_view(p), p.buffer, p.block) for p in everywhere if p.rank == partition.rank]
        self._shared = any(piece.rank != reducers[piece.block] for piece in everywhere)
        self._group = partition.process_group

    def normalized(self, buffers: Sequence[Tensor | None]) -> list[Tensor | None]:
        """New buffers, every segment of them divided by its norm over all ranks; a zero segment stays zero."""
        squares = self._norms.squares(buffers)
        if self._shared:
            dist.all_reduce(squares, group=self._group)
        norms = squares.sqrt_()
        inverse = torch.where(norms > 0, norms.reciprocal(), torch.zeros_like(norms))
        scaled = [buffer.clone() if buffer is not None else None for buffer in buffers]
        for view, buffer, segment in self._mine:
            if scaled[buffer] is not None:
                view.of(scaled).mul_(inverse[segment])
        return scaled


def _first_of_each(fragments: Sequence[Fragment]) -> list[Fragment]:
    return list({fragment.parameter: fragment for fragment in reversed(fragments)}.values())[::-1]


def _extent(name: str, fragments: Sequence[Fragment]) -> int:
    return max(fragment.start + fragment.numel for fragment in fragments if fragment.parameter == name)
