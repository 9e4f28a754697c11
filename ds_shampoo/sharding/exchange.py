"""The two all-to-alls of a step: pieces of shards to the blocks' owners, and the owners' directions back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ds_shampoo.algorithm.blocks import Block
from ds_shampoo.sharding.fragments import Piece, row_major
from ds_shampoo.sharding.partition import Partition


@dataclass(frozen=True, slots=True)
class StackSlot:
    """Where an owned block lies: which stack of equal-shaped blocks, and which slot of it."""

    stack: int
    slot: int


@dataclass(frozen=True, slots=True)
class _View:
    """A strided view into one of several contiguous tensors."""

    tensor: int
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    def of(self, tensors: Sequence[Tensor | None]) -> Tensor:
        base = tensors[self.tensor]
        assert base is not None, "only local pieces may lack a buffer"
        return base.as_strided(self.sizes, self.strides, base.storage_offset() + self.offset)


@dataclass(frozen=True, slots=True)
class _Transfer:
    """A piece on its way between a shard's buffer and its owner's stack; this rank holds one end or both."""

    block: int
    numel: int
    sizes: tuple[int, ...]
    in_buffer: _View | None
    in_stack: _View | None


@dataclass(frozen=True)
class _Route:
    """One all-to-all as this rank sees it, pieces in the order that sender and receiver share."""

    local: Sequence[_Transfer]
    send: Sequence[_Transfer]
    send_splits: list[int]
    receive: Sequence[_Transfer]
    receive_splits: list[int]


@dataclass(frozen=True)
class _Flight:
    """An all-to-all under way, and the flat tensors that it reads and fills."""

    work: dist.Work
    send: Tensor
    receive: Tensor
    arriving: Sequence[_Transfer]

    def land(self) -> list[Tensor]:
        """The pieces that were received, in the order of the route; an accelerator waits for them, not the host."""
        self.work.wait()
        return _unpack(self.receive, self.arriving)


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
        ends = {piece: self._transfer(piece, blocks[piece.block], stack_slots.get(piece.block)) for piece in pieces}
        self._gather = self._route([(piece.rank, owners[piece.block], ends[piece]) for piece in chosen])
        self._scatter = self._route([(owners[piece.block], piece.rank, ends[piece]) for piece in pieces])

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
            flight = self._depart(self._gather, [_end(t.in_buffer).of(buffers) for t in self._gather.send])
        return Gathering(buffers, flight)

    def finish(self, gathering: Gathering, stacks: Sequence[Tensor]) -> None:
        """Fills this rank's stacks with the pieces that a `gather` brings, once they are here.

        Args:
            stacks: [n, *shape] fp32, overwritten.
        """
        for transfer in self._gather.local:
            if gathering.buffers[_end(transfer.in_buffer).tensor] is not None:
                _end(transfer.in_stack).of(stacks).copy_(_end(transfer.in_buffer).of(gathering.buffers))
        if gathering.flight is not None:
            for transfer, values in zip(self._gather.receive, gathering.flight.land(), strict=True):
                _end(transfer.in_stack).of(stacks).copy_(values)
        self._round(stacks)

    def scatter(
        self,
        stacks: Sequence[Tensor],
        buffers: Sequence[Tensor | None],
        directed: Mapping[int, bool],
        flags: Tensor | None = None,
    ) -> None:
        """Writes the owners' directions over everyone's flat buffers, for the blocks that have one.

        Args:
            stacks: this rank's directions, [n, *shape] fp32.
            buffers: this rank's flat fp32 buffers, changed where pieces lie of a block that has a direction.
            directed: by block ordinal, whether an owned block has one.
            flags: [blocks] on the device, above 0 for every block whose owner has one; needed where
                anything moves, so that no rank has to ask another one's host.
        """
        self._round(stacks)
        for transfer in self._scatter.local:
            if directed[transfer.block] and buffers[_end(transfer.in_buffer).tensor] is not None:
                _end(transfer.in_buffer).of(buffers).copy_(_end(transfer.in_stack).of(stacks))
        if self.moves:
            assert flags is not None
            flight = self._depart(self._scatter, [_end(t.in_stack).of(stacks) for t in self._scatter.send])
            for transfer, direction in zip(self._scatter.receive, flight.land(), strict=True):
                target = _end(transfer.in_buffer).of(buffers)
                target.copy_(torch.where(flags[transfer.block] > 0, direction.to(target.dtype), target))

    def _depart(self, route: _Route, outgoing: Iterable[Tensor]) -> _Flight:
        send = torch.empty(sum(route.send_splits), dtype=self._dtype, device=self._device)
        for packed, values in zip(_unpack(send, route.send), outgoing, strict=True):
            packed.copy_(values)
        receive = torch.empty(sum(route.receive_splits), dtype=self._dtype, device=self._device)
        work = dist.all_to_all_single(
            receive,
            send,
            route.receive_splits,
            route.send_splits,
            group=self._partition.process_group,
            async_op=True,
        )
        return _Flight(work, send, receive, route.receive)

    def _round(self, stacks: Sequence[Tensor]) -> None:
        """Rounds every block to the exchange's dtype, sent or not, so that no result depends on who owns what."""
        if self._dtype != torch.float32:
            for stack in stacks:
                stack.copy_(stack.to(self._dtype))

    def _transfer(self, piece: Piece, block: Block, stack_slot: StackSlot | None) -> _Transfer:
        in_buffer, in_stack = None, None
        if piece.rank == self._partition.rank:
            in_buffer = buffer_view(piece)
        if stack_slot is not None:
            strides = row_major(block.shape)
            first = sum(at * stride for at, stride in zip(piece.box.starts, strides, strict=True))
            in_stack = _View(stack_slot.stack, stack_slot.slot * block.numel + first, piece.box.sizes, strides)
        return _Transfer(piece.block, piece.box.numel, piece.box.sizes, in_buffer, in_stack)

    def _route(self, moves: Iterable[tuple[int, int, _Transfer]]) -> _Route:
        me, world = self._partition.rank, self._partition.world_size
        local: list[_Transfer] = []
        send: dict[int, list[_Transfer]] = defaultdict(list)
        receive: dict[int, list[_Transfer]] = defaultdict(list)
        for source, target, transfer in moves:
            if source == me and target == me:
                local.append(transfer)
            elif source == me:
                send[target].append(transfer)
            elif target == me:
                receive[source].append(transfer)
        return _Route(
            local,
            [transfer for rank in range(world) for transfer in send[rank]],
            [sum(transfer.numel for transfer in send[rank]) for rank in range(world)],
            [transfer for rank in range(world) for transfer in receive[rank]],
            [sum(transfer.numel for transfer in receive[rank]) for rank in range(world)],
        )


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


def buffer_view(piece: Piece) -> _View:
    """Where a piece's elements lie in the buffers of the rank that holds it."""
    return _View(piece.buffer, piece.offset, piece.box.sizes, piece.strides)


def _end(view: _View | None) -> _View:
    assert view is not None, "this rank does not hold that end of the piece"
    return view


def _unpack(flat: Tensor, transfers: Sequence[_Transfer]) -> list[Tensor]:
    parts = torch.split(flat, [transfer.numel for transfer in transfers]) if transfers else ()
    return [part.view(transfer.sizes) for part, transfer in zip(parts, transfers, strict=True)]
