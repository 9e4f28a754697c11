"""The two all-to-alls of a step: pieces of shards to the blocks' owners, and the owners' directions back."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ds_shampoo.algorithm.blocks import Block
from ds_shampoo.sharding.copies import Copies, Copy, View
from ds_shampoo.sharding.fragments import Piece, row_major
from ds_shampoo.sharding.partition import Partition


@dataclass(frozen=True, slots=True)
class StackSlot:
    """Where an owned block lies: which stack of equal-shaped blocks, and which slot of it."""

    stack: int
    slot: int


class _Move(NamedTuple):
    """A piece on its way, from which rank to which; a view is None where its end is another rank's."""

    piece: Piece
    sender: int
    receiver: int
    source: View | None
    target: View | None


@dataclass(frozen=True)
class _Route:
    """One all-to-all as this rank sees it: what stays here, what is packed for others, and what they sent."""

    local: Copies
    send: Copies
    send_splits: list[int]
    receive: Copies
    receive_splits: list[int]


@dataclass(frozen=True)
class _Flight:
    """An all-to-all under way, and the flat tensors that it reads and fills."""

    work: dist.Work
    send: Tensor
    receive: Tensor

    def land(self) -> list[Tensor]:
        """What was received; an accelerator waits for it, not the host."""
        self.work.wait()
        return [self.receive]


@dataclass(frozen=True)
class Gathering:
    """Pieces on their way to the blocks' owners; `ExchangePlan.finish` puts them in stack_slot."""

    buffers: Sequence[Tensor | None]
    flight: _Flight | None


class ExchangePlan:
    """Which pieces go where; built once from the pieces of all ranks and the owners, identically on each rank.

    Attributes:
        sources: this rank's pieces among those that cover every block exactly once over all ranks.
        moves: whether any rank sends anything; without that no collective is ever called.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        pieces: Sequence[Piece],
        owners: Sequence[int],
        *,
        stack_slots: Mapping[int, StackSlot],
        partition: Partition,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._partition, self._device, self._dtype = partition, device, dtype
        chosen = choose_sources(blocks, pieces, owners)
        self.sources = tuple(piece for piece in chosen if piece.rank == partition.rank)
        self.moves = any(piece.rank != owners[piece.block] for piece in pieces)
        in_buffers = {piece: buffer_view(piece) if piece.rank == partition.rank else None for piece in pieces}
        in_stacks = {
            piece: _stack_view(piece, blocks[piece.block], stack_slots[piece.block])
            if piece.block in stack_slots
            else None
            for piece in pieces
        }
        self._gather = self._route(
            _Move(piece, piece.rank, owners[piece.block], in_buffers[piece], in_stacks[piece]) for piece in chosen
        )
        self._scatter = self._route(
            _Move(piece, owners[piece.block], piece.rank, in_stacks[piece], in_buffers[piece]) for piece in pieces
        )

    @property
    def gather_bytes(self) -> int:
        """What this rank sends to owners in one `gather`."""
        return sum(self._gather.send_splits) * self._dtype.itemsize

    @property
    def scatter_bytes(self) -> int:
        """What this rank sends back in one `scatter`."""
        return sum(self._scatter.send_splits) * self._dtype.itemsize

    def gather(self, buffers: Sequence[Tensor | None]) -> Gathering:
        """Sends the pieces of this rank's buffers to the blocks' owners, without waiting for anyone.

        Args:
            buffers: this rank's flat fp32 buffers, which may not change before the gathering is finished. None for a
                parameter without gradient, possible only where nothing moves: its slots keep what they hold.
        """
        flight = None
        if self.moves:
            assert all(buffer is not None for buffer in buffers), "only where nothing moves may a buffer be missing"
            flight = self._depart(self._gather, buffers)
        return Gathering(buffers, flight)

    def finish(self, gathering: Gathering, stacks: Sequence[Tensor]) -> None:
        """Fills this rank's stacks with the pieces that a `gather` brings, once they are here.

        Args:
            stacks: [n, *shape] fp32, overwritten.
        """
        self._gather.local.run(gathering.buffers, stacks)
        if gathering.flight is not None:
            self._gather.receive.run(gathering.flight.land(), stacks)
        self._round(stacks)

    def scatter(
        self, stacks: Sequence[Tensor], buffers: Sequence[Tensor | None], directed: Tensor | None = None
    ) -> None:
        """Writes the owners' directions over everyone's flat buffers, for the blocks that have one.

        Args:
            stacks: this rank's directions, [n, *shape] fp32.
            buffers: this rank's flat fp32 buffers, changed where pieces lie of a block that has a direction.
            directed: [blocks] on the device, above 0 for every block whose owner has one, so that no rank has to ask
                another one's host; None where all have.
        """
        self._round(stacks)
        self._scatter.local.run(stacks, buffers, directed)
        if self.moves:
            self._scatter.receive.run(self._depart(self._scatter, stacks).land(), buffers, directed)

    def _depart(self, route: _Route, tensors: Sequence[Tensor | None]) -> _Flight:
        send = torch.empty(sum(route.send_splits), dtype=self._dtype, device=self._device)
        route.send.run(tensors, [send])
        receive = torch.empty(sum(route.receive_splits), dtype=self._dtype, device=self._device)
        work = dist.all_to_all_single(
            receive,
            send,
            route.receive_splits,
            route.send_splits,
            group=self._partition.process_group,
            async_op=True,
        )
        return _Flight(work, send, receive)

    def _round(self, stacks: Sequence[Tensor]) -> None:
        """Rounds every block to the exchange's dtype, sent or not, so that no result depends on who owns what."""
        if self._dtype != torch.float32:
            for stack in stacks:
                stack.copy_(stack.to(self._dtype))

    def _route(self, moves: Iterable[_Move]) -> _Route:
        """Of all ranks' moves, in an order that they share: that of the pieces in the messages."""
        me, world = self._partition.rank, self._partition.world_size
        local: list[_Move] = []
        send: list[list[_Move]] = [[] for _ in range(world)]
        receive: list[list[_Move]] = [[] for _ in range(world)]
        for move in moves:
            if move.sender == me and move.receiver == me:
                local.append(move)
            elif move.sender == me:
                send[move.receiver].append(move)
            elif move.receiver == me:
                receive[move.sender].append(move)
        return _Route(
            Copies([Copy(_end(move.source), _end(move.target), move.piece.block) for move in local], self._device),
            Copies([Copy(_end(move.source), view, move.piece.block) for move, view in _packed(send)], self._device),
            [_numel(moves) for moves in send],
            Copies([Copy(view, _end(move.target), move.piece.block) for move, view in _packed(receive)], self._device),
            [_numel(moves) for moves in receive],
        )


def _packed(by_rank: Iterable[Sequence[_Move]]) -> Iterator[tuple[_Move, View]]:
    """Each move, and where its piece lies in a flat message, one after another."""
    offset = 0
    for move in itertools.chain.from_iterable(by_rank):
        sizes = move.piece.box.sizes
        yield move, View(0, offset, sizes, row_major(sizes))
        offset += move.piece.box.numel


def _numel(moves: Iterable[_Move]) -> int:
    return sum(move.piece.box.numel for move in moves)


def choose_sources(blocks: Sequence[Block], pieces: Sequence[Piece], owners: Sequence[int]) -> list[Piece]:
    """The pieces from which each block is put together: the owner's own where it holds all of it, else all.

    Raises:
        RuntimeError: if the pieces don't cover a block exactly once; a layout was misread.
    """
    by_block: dict[int, list[Piece]] = defaultdict(list)
    for piece in pieces:
        by_block[piece.block].append(piece)
    chosen: list[Piece] = []
    for ordinal, block in enumerate(blocks):
        own = [piece for piece in by_block[ordinal] if piece.rank == owners[ordinal]]
        picked = own if sum(piece.box.numel for piece in own) == block.numel else by_block[ordinal]
        covered = sum(piece.box.numel for piece in picked)
        if covered != block.numel:
            raise RuntimeError(f"block {block} of shape {block.shape} is covered by {covered} elements")
        chosen.extend(picked)
    return chosen


def buffer_view(piece: Piece) -> View:
    """Where a piece's elements lie in the buffers of the rank that holds it."""
    return View(piece.buffer, piece.offset, piece.box.sizes, piece.strides)


def _stack_view(piece: Piece, block: Block, stack_slot: StackSlot) -> View:
    strides = row_major(block.shape)
    first = sum(at * stride for at, stride in zip(piece.box.starts, strides, strict=True))
    return View(stack_slot.stack, stack_slot.slot * block.numel + first, piece.box.sizes, strides)


def _end(view: View | None) -> View:
    assert view is not None, "this rank does not hold that end of the piece"
    return view
