"""Boxes of many tensors worked on in one launch: copied, scaled, or summed up by segments.

A box is a part of two dimensions of a flat tensor: rows of neighbouring elements, a stride apart. A launch goes by a
table on the device, of which each row is a tile: two boxes of one shape that a program takes through, and a segment.
Where tensors begin changes from step to step, and goes to the device as a few addresses.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The kinds of devices that Triton compiles for; its interpreter would take a CPU's tensors too.
DEVICES = frozenset({"cuda"})
# The most elements of a tile: so few that a large box keeps all of a device at work, and tables stay small.
TILE = 8192
# Elements that a program has under way at once.
_CHUNK = 1024
_WIDTH = 9


class Flat(NamedTuple):
    """A box of one tensor: which one, where it begins, and from row to row; in elements."""

    tensor: int
    offset: int
    stride: int


class Tile(NamedTuple):
    """A row of a table; both ends are alike where there is only one tensor."""

    source: Flat
    target: Flat
    rows: int
    columns: int
    segment: int

    def parts(self, most: int = TILE) -> Iterator[Tile]:
        """The same in tiles of at most so many elements."""
        columns = min(self.columns, most)
        rows = max(1, most // columns)
        for row in range(0, self.rows, rows):
            for column in range(0, self.columns, columns):
                source, target = (
                    end._replace(offset=end.offset + row * end.stride + column) for end in (self.source, self.target)
                )
                size = min(rows, self.rows - row), min(columns, self.columns - column)
                yield Tile(source, target, *size, self.segment)


class Table:
    """Tiles on a device, and how many there are of each segment where they are in its order."""

    def __init__(self, tiles: Iterable[Tile], device: torch.device) -> None:
        """`tiles` of any size; they are cut."""
        rows = [(*tile.source, *tile.target, *tile[2:]) for whole in tiles for tile in whole.parts()]
        self.tiles = len(rows)
        self.segments = [row[-1] for row in rows]
        host = torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, _WIDTH)
        self.rows = host.to(device)


class BoxKernels:
    """The kernels on one device.

    Every tensor of a list is of one dtype; one that is None is left out, with its boxes.
    """

    def __init__(self, device: torch.device) -> None:
        """
        Raises:
            ImportError: without Triton.
            RuntimeError: where a trial gives other numbers than torch.
        """
        from ds_shampoo.kernels import triton_boxes  # of which the import asks for Triton

        self._kernels: Any = triton_boxes
        self._device = device
        self._addresses: dict[tuple[int, ...], Tensor] = {}
        self._try()

    def copy(
        self,
        table: Table,
        sources: Sequence[Tensor | None],
        targets: Sequence[Tensor | None],
        *,
        flags: Tensor | None = None,
    ) -> None:
        """Every target's box takes its source's; with `flags`, [segments], only where its segment's is above 0."""
        self._move(table, sources, targets, numbers=flags, how="where" if flags is not None else "copy")

    def scale(self, table: Table, tensors: Sequence[Tensor | None], factors: Tensor) -> None:
        """Every box is multiplied by the factor of its segment, [segments] fp32."""
        self._move(table, tensors, tensors, numbers=factors, how="scale")

    def squares(self, table: Table, tensors: Sequence[Tensor | None], starts: Tensor) -> Tensor:
        """[segments] fp32: sums of squares, always added in the same order.

        Args:
            table: in the order of segments.
            starts: [segments + 1] int64, which tiles are each one's.
        """
        partial = torch.zeros(max(1, table.tiles), dtype=torch.float32, device=self._device)
        total = torch.empty(starts.numel() - 1, dtype=torch.float32, device=self._device)
        with _on(self._device):
            if table.tiles and any(tensor is not None for tensor in tensors):
                self._kernels.squares[(table.tiles,)](
                    table.rows,
                    self._addresses_of(tensors),
                    partial,
                    source_type=self._type(tensors),
                    chunk=_CHUNK,
                    width=_WIDTH,
                )
            if total.numel():
                self._kernels.sum_up[(total.numel(),)](partial, starts, total, chunk=_CHUNK)
        return total

    def _move(
        self,
        table: Table,
        sources: Sequence[Tensor | None],
        targets: Sequence[Tensor | None],
        *,
        numbers: Tensor | None,
        how: str,
    ) -> None:
        if not table.tiles or all(t is None for t in sources) or all(t is None for t in targets):
            return
        with _on(self._device):
            self._kernels.move[(table.tiles,)](
                table.rows,
                self._addresses_of(sources),
                self._addresses_of(targets),
                table.rows if numbers is None else numbers,  # which nothing reads
                source_type=self._type(sources),
                target_type=self._type(targets),
                how=how,
                chunk=_CHUNK,
                width=_WIDTH,
            )

    def _type(self, tensors: Sequence[Tensor | None]) -> Any:
        """The dtype of those that there are, in Triton's words."""
        return self._kernels.TYPES[next(tensor for tensor in tensors if tensor is not None).dtype]

    def _addresses_of(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Where tensors begin, on the device; 0 for those that are not there. Known ones need no copy."""
        key = tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)
        if key not in self._addresses:
            if len(self._addresses) >= 64:
                self._addresses.clear()
            self._addresses[key] = torch.tensor(key, dtype=torch.int64, device="cpu").to(
                self._device, non_blocking=True
            )
        return self._addresses[key]

    def _try(self) -> None:
        """Copies, scales and adds up what torch does too."""
        source = torch.arange(1, 25, dtype=torch.float32, device=self._device)
        target = torch.zeros(24, dtype=torch.bfloat16, device=self._device)
        tile = Tile(Flat(0, 2, 6), Flat(1, 1, 4), rows=3, columns=3, segment=1)
        table = Table([tile], self._device)
        self.copy(table, [source], [None, target])
        numbers = torch.tensor([0.0, 2.0], dtype=torch.float32, device=self._device)
        own = Table([tile._replace(target=tile.source)], self._device)
        self.scale(own, [source], numbers)
        starts = torch.tensor([0, 0, 1], dtype=torch.int64, device=self._device)
        found = torch.cat([source, target.float(), self.squares(own, [source], starts)])
        expected = torch.arange(1, 25, dtype=torch.float32, device=self._device)
        copied = torch.zeros(24, dtype=torch.float32, device=self._device)
        boxes = expected.as_strided((3, 3), (6, 1), 2), copied.as_strided((3, 3), (4, 1), 1)
        boxes[1].copy_(boxes[0])
        boxes[0].mul_(2)
        sums = torch.stack([torch.zeros_like(expected[0]), boxes[0].square().sum()])
        if not torch.equal(found, torch.cat([expected, copied, sums])):
            raise RuntimeError("they give other numbers than torch")


def box_kernels(device: torch.device) -> BoxKernels | None:
    """Those of a CUDA device where Triton is installed and passes a trial; None for torch's views one by one."""
    return _found(device).kernels


def describe(device: torch.device) -> str:
    """One line for the table at start."""
    found = _found(device)
    reason = f" ({found.reason})" if found.reason else ""
    return f"pieces on {device.type}: {'by Triton in one launch' if found.kernels else f'one by one{reason}'}"


class _Found(NamedTuple):
    kernels: BoxKernels | None
    reason: str


@functools.cache
def _found(device: torch.device) -> _Found:
    if device.type not in DEVICES:
        return _Found(None, "")
    try:
        return _Found(BoxKernels(device), "")
    except Exception as error:  # whatever a build of Triton that does not fit makes of it
        return _Found(None, f"Triton is not used: {error}")


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
