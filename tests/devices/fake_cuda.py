"""A CUDA device of shapes: the real step on torch's fake tensors, and a watch over what it has the device do.

Stood in for, since nothing here has a value or takes time:
- CUDA's streams and events (`torch.cuda.Stream` and so on): objects without effect;
- the answers of root jobs: a root of the right shape and dtype, through the real buffers and the real `install`;
- the root threads: jobs are solved when they are due, on the calling thread;
- the comparison of all ranks' block tables at start, which reads a tensor;
- Triton: its kernels' launches are counted, and where tensors begin is sent to the device each time;
- other ranks: torch's "fake" process group, whose collectives move nothing.

Everything else is the package's own code and torch's own shape, dtype and device rules.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import cpp_extension
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from ds_shampoo import accelerators
from ds_shampoo.algorithm import multi_tensor
from ds_shampoo.kernels import boxes
from ds_shampoo.kernels.boxes import BoxKernels
from ds_shampoo.roots import service
from ds_shampoo.roots.jobs import RootAnswer, RootJob, Verdict
from ds_shampoo.roots.pool import InlineExecutor
from ds_shampoo.roots.transfer import Transfers
from ds_shampoo.sharding.fragments import Fragment
from ds_shampoo.sharding.layout import WholeLayout
from ds_shampoo.sharding.partition import LogicalParameter, Partition
from ds_shampoo.step import subgroups

CUDA = torch.device("cuda", 0)
RANK, WORLD_SIZE = 1, 4

# What can't go on before the device has computed a value, which it gives to the host or which decides its shape.
_NEEDS_VALUES = {
    "aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::allclose",
    "aten::masked_select", "aten::unique_consecutive", "aten::_unique2", "aten::repeat_interleave.Tensor",
}  # fmt: skip
_INDEXING = {"aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"}


class Watch(TorchDispatchMode):
    """Follows every operation on the device.

    Attributes:
        launches: by operation, how often the device was given one.
        syncs: what made the host wait for the device.
        crossings: blocking copies from or to host memory, which offloaded shards can't do without.
    """

    def __init__(self) -> None:
        super().__init__()
        self.restart()

    def restart(self) -> None:
        self.launches: Counter[str] = Counter()
        self.syncs: list[str] = []
        self.crossings = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        given = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        if name in _NEEDS_VALUES and any(tensor.is_cuda for tensor in given):
            self.syncs.append(name)
        if name == "aten::copy_":
            self._copied(args[1], args[0], args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        elif name != "aten::_to_copy" and len({tensor.device for tensor in given if tensor.dim()}) > 1:
            raise AssertionError(f"{name} of tensors on {[str(tensor.device) for tensor in given]}")
        if name in _INDEXING and any(tensor.dtype in (torch.bool, torch.uint8) for tensor in given[1:]):
            self.syncs.append(f"{name} by a mask")
        found = func(*args, **kwargs)
        made = [leaf for leaf in tree_flatten(found)[0] if isinstance(leaf, Tensor)]
        if name == "aten::_to_copy":
            self._copied(args[0], made[0], kwargs.get("non_blocking", False))
        if any(tensor.is_cuda for tensor in [*given, *made]) and not _is_free(func):
            self.launches[name.removeprefix("aten::")] += 1
        return found

    def _copied(self, source: Tensor, target: Tensor, non_blocking: bool) -> None:
        if source.device != target.device and not non_blocking:
            self.crossings += 1


class _Constructors(TorchFunctionMode):
    """`torch.tensor` on a device is made on the host and copied while that waits; fake tensors show no copy."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            self._watch.crossings += 1
        return func(*args, **kwargs)


def _is_free(func: Any) -> bool:
    """A view, or memory without a kernel."""
    name, returns = func._schema.name, func._schema.returns
    views = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return views or name.startswith(("aten::empty", "aten::new_empty", "aten::detach", "prim::"))


class _Stream:
    """CUDA's `Stream` without effect."""

    def __init__(self, device: Any = None, **_: Any) -> None:
        self.device = CUDA

    def wait_stream(self, other: Any) -> None: ...
    def synchronize(self) -> None: ...


class _Event:
    """CUDA's `Event` without effect."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return 0.0


class _NoThreads(InlineExecutor):
    """Solves tasks when they are due; with what the service asks of a pool."""

    waits, wait_s, lost = 0, 0.0, 0

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def queue_depth(self) -> int:
        return 0

    def busy_s(self) -> float:
        return 0.0

    busy_share = busy_s


def _solved(job: RootJob, transfers: Transfers) -> RootAnswer:
    """A root of the right shape; a refusal for statistics of three updates, by the default `statistics_beta`."""
    assert isinstance(job.snapshot.wait(), FakeTensor)
    if job.correction == 1 - 0.5**3:
        return RootAnswer(Verdict.REJECTED, "stand-in")
    root = torch.empty(job.order, job.order, dtype=torch.float64, device="cpu")
    return RootAnswer(Verdict.ACCEPTED, "stand-in", transfers.result(root, job.root_dtype))


class _Launch:
    """A kernel of Triton's that is only counted."""

    def __init__(self, watch: Watch, name: str) -> None:
        self._watch, self._name = watch, name

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launched(*tensors: Tensor, **_: Any) -> None:
            assert grid[0] > 0
            assert all(tensor.is_cuda for tensor in tensors)
            self._watch.launches[self._name] += 1

        return launched


def _counting(watch: Watch) -> type[BoxKernels]:
    class Counting(BoxKernels):
        def _try(self) -> None: ...

        def __init__(self, device: torch.device) -> None:
            kernels = {name: _Launch(watch, name) for name in ("move", "squares", "sum_up")}
            self._device = device
            self._kernels = SimpleNamespace(**kernels, TYPES={torch.float32: "fp32", torch.bfloat16: "bf16"})

        def _addresses_of(self, tensors: Sequence[Tensor | None]) -> Tensor:
            host = torch.tensor([0] * len(tensors), dtype=torch.int64, device="cpu")
            return host.to(self._device, non_blocking=True)

    return Counting


@functools.cache
def guard() -> str | None:
    """Builds and registers the device guard, once for a process; why there is none, where that is so."""
    if torch.cuda.is_available():
        return "torch drives real CUDA devices here"
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR", tempfile.gettempdir())) / "ds_shampoo_no_op_guard"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        cpp_extension.load(
            "ds_shampoo_no_op_guard",
            [str(Path(__file__).with_name("no_op_guard.cpp"))],
            build_directory=str(folder),
            is_python_module=False,
        )
    except (RuntimeError, OSError) as error:
        return f"no C++ compiler can build the device guard: {str(error).splitlines()[0]}"
    return None


@contextlib.contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Fake tensors from here on, on a device that the package takes for CUDA."""
    current = _Stream()
    for name, stub in {
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda device=None: current,
        "stream": lambda stream: contextlib.nullcontext(),
        "set_device": lambda device: None,
        "device": lambda device: contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(FakeTensor, "record_stream", lambda self, stream: None, raising=False)
    monkeypatch.setattr(accelerators, "has_values", lambda tensor: True)
    monkeypatch.setattr(service, "ThreadPool", _NoThreads)
    monkeypatch.setattr(RootJob, "solve", _solved)
    monkeypatch.setattr(subgroups, "check_agreement", lambda *arguments: None)
    watch = Watch()
    monkeypatch.setattr(boxes, "BoxKernels", _counting(watch))
    boxes._found.cache_clear()
    try:
        with FakeTensorMode(), watch, _Constructors(watch):
            yield watch
    finally:
        # Those of a device that is not there.
        multi_tensor.kernels_for.cache_clear()
        boxes._found.cache_clear()


@contextlib.contextmanager
def fake_ranks() -> Iterator[dist.ProcessGroup]:
    """A process group of ranks that are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=WORLD_SIZE)
    try:
        group = dist.group.WORLD
        assert group is not None
        yield group
    finally:
        dist.destroy_process_group()


class OffloadLayout(WholeLayout):
    """Parameters on the host, blocks on the device."""

    def device(self, parameter: Tensor) -> torch.device:
        return CUDA


class ShardedLayout(WholeLayout):
    """One flat fp32 tensor per param group, of which this rank has a share, as ZeRO leaves them.

    Args:
        pieces: every parameter is cut into equal pieces for all ranks (stage 3); else the flat tensor is (stages 1, 2).
    """

    keeps_blocks_apart = True

    def __init__(self, group: dist.ProcessGroup, pieces: bool) -> None:
        self._group, self._pieces = group, pieces

    def device(self, parameter: Tensor) -> torch.device:
        return CUDA

    def share(self, shapes: Sequence[tuple[int, ...]]) -> int:
        """How many elements of a group of such parameters each rank holds."""
        numels = [math.prod(shape) for shape in shapes]
        if self._pieces:
            return sum(-(-numel // WORLD_SIZE) for numel in numels)
        return -(-sum(numels) // WORLD_SIZE)

    def members(self, originals: Sequence[LogicalParameter], held: Sequence[Tensor]) -> Sequence[LogicalParameter]:
        return originals

    def partition(self, members: Sequence[LogicalParameter], held: Sequence[Tensor]) -> Partition:
        find = self._of_pieces if self._pieces else self._of_flat
        return Partition(list(find(members)), RANK, WORLD_SIZE, self._group)

    def _of_pieces(self, members: Sequence[LogicalParameter]) -> Iterator[Fragment]:
        offset = 0
        for member in members:
            numel = math.prod(member.shape)
            size = -(-numel // WORLD_SIZE)
            for rank in range(WORLD_SIZE):
                if numel > rank * size:
                    yield Fragment(member.name, rank * size, min(size, numel - rank * size), rank, 0, offset)
            offset += size

    def _of_flat(self, members: Sequence[LogicalParameter]) -> Iterator[Fragment]:
        share = self.share([member.shape for member in members])
        at = 0
        for member in members:
            start, numel = 0, math.prod(member.shape)
            while start < numel:
                rank, offset = divmod(at, share)
                length = min(numel - start, share - offset)
                yield Fragment(member.name, start, length, rank, 0, offset)
                start, at = start + length, at + length
