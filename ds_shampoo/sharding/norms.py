"""Norms of blocks and whole parameters whose elements lie over several ranks: partial sums and one all-reduce."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ds_shampoo.algorithm.blocks import Block
from ds_shampoo.algorithm.multi_tensor import kernels_for
from ds_shampoo.kernels.boxes import Table, box_kernels
from ds_shampoo.sharding.copies import Copy, table_of
from ds_shampoo.sharding.exchange import buffer_view, choose_sources
from ds_shampoo.sharding.fragments import Box, Fragment, Piece
from ds_shampoo.sharding.partition import Partition


class PieceNorms:
    """Sums of squares over this rank's pieces, by the ordinal of the segment they belong to."""

    def __init__(self, pieces: Sequence[Piece], segments: int, device: torch.device) -> None:
        self._pieces = [Copy(buffer_view(p), buffer_view(p), p.block) for p in sorted(pieces, key=lambda p: p.block)]
        self._segments, self._device = segments, device
        self._ordinals = torch.tensor([piece.segment for piece in self._pieces], dtype=torch.long, device=device)
        self._kernels = box_kernels(device)
        self._tables = self._for_kernels() if self._kernels is not None else None

    def squares(self, buffers: Sequence[Tensor | None]) -> Tensor:
        """[segments] fp32: what this rank's buffers add to each squared norm; an absent buffer adds nothing."""
        if self._kernels is not None and self._tables is not None:
            return self._kernels.squares(self._tables[0], buffers, self._tables[1])
        total = torch.zeros(self._segments, dtype=torch.float32, device=self._device)
        present = [i for i, piece in enumerate(self._pieces) if buffers[piece.source.tensor] is not None]
        if present:
            norms = kernels_for(self._device).norms([self._pieces[i].source.of(buffers) for i in present])
            ordinals = self._ordinals
            if len(present) < len(self._pieces):
                chosen = torch.tensor(present, dtype=torch.int64, device="cpu")
                ordinals = ordinals[chosen.to(self._device, non_blocking=True)]
            # In one order on an accelerator too, where index_add_ leaves that to chance.
            total.index_put_((ordinals,), norms.square(), accumulate=True)
        return total

    def _for_kernels(self) -> tuple[Table, Tensor]:
        """The pieces, and where each segment's tiles begin, with the end of the last."""
        table = table_of(self._pieces, self._device)
        counts = Counter(table.segments)
        starts = itertools.accumulate((counts[segment] for segment in range(self._segments)), initial=0)
        return table, torch.tensor(list(starts), dtype=torch.int64, device="cpu").to(self._device)


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
        self._mine = [Copy(buffer_view(p), buffer_view(p), p.block) for p in everywhere if p.rank == partition.rank]
        self._kernels = box_kernels(device)
        self._table = table_of(self._mine, device) if self._kernels is not None else None
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
        if self._kernels is not None and self._table is not None:
            self._kernels.scale(self._table, scaled, inverse)
            return scaled
        for piece in self._mine:
            if scaled[piece.source.tensor] is not None:
                piece.source.of(scaled).mul_(inverse[piece.segment])
        return scaled


def _first_of_each(fragments: Sequence[Fragment]) -> list[Fragment]:
    return list({fragment.parameter: fragment for fragment in reversed(fragments)}.values())[::-1]


def _extent(name: str, fragments: Sequence[Fragment]) -> int:
    return max(fragment.start + fragment.numel for fragment in fragments if fragment.parameter == name)
