"""torch's DistributedDataParallel: its ranks hold every parameter whole, and share the blocks out among them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ds_shampoo.config import SettingsError
from ds_shampoo.parameters.members import tensors_in
from ds_shampoo.sharding.gathering import gathered
from ds_shampoo.sharding.layout import Layout, WholeLayout
from ds_shampoo.sharding.partition import LogicalParameter, Partition, replicated

logger = logging.getLogger("ds_shampoo")

_Said = TypeVar("_Said")

# What DistributedDataParallel calls the module that it wraps.
_WRAPPED = "module."
# In so many steps a gradient of zeros is looked at again: LoRA's, say, begin with one.
_ZEROS = 10
# Integers of a float's size, by bytes.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def layout_for(model: nn.Module | None, params: Any) -> Layout:
    """That of the DistributedDataParallel module which `model` is, or has in it, where it has all that is trained.

    All ranks of its process group call this at once, and all of them decide alike.

    Args:
        params: what `listed` gave.

    Returns:
        That of whole parameters in one process where there is no such module. Where there is one, but something is
        trained outside of it, that is said.

    Raises:
        SettingsError: where it is so on some ranks only.
    """
    if model is None or not dist.is_available() or not dist.is_initialized():
        return WholeLayout()
    wrapped = {path: m for path, m in model.named_modules() if isinstance(m, DistributedDataParallel)}
    groups = {id(ddp.process_group): ddp.process_group for ddp in wrapped.values()}
    if len(groups) != 1:
        return WholeLayout()
    (group,) = groups.values()
    layout = DataParallelLayout(model, wrapped, group)
    members = [params] if isinstance(params, Tensor) else params
    outside = next((tuple(t.shape) for t in tensors_in(members) if t.requires_grad and not layout.averages(t)), None)
    if len(set(gathered("" if outside is None else "outside", group))) > 1:
        raise SettingsError(
            "on some ranks all trained parameters are of the DistributedDataParallel module, and on others not: pass "
            "the same parameters on all ranks"
        )
    if outside is None:
        return layout
    if dist.get_rank(group) == 0:
        logger.warning(
            "a parameter of shape %s is trained whose gradients the DistributedDataParallel module does not average, "
            "so that ranks can't share the blocks: give such parameters an optimizer of their own",
            outside,
        )
    return WholeLayout()


class DataParallelLayout(WholeLayout):
    """Every rank of a process group holds every parameter, and has the same gradients as all others.

    Names are those of the model without the wrapper.
    """

    alone = False

    def __init__(
        self, model: nn.Module, wrapped: Mapping[str, DistributedDataParallel], group: dist.ProcessGroup
    ) -> None:
        """`wrapped` are the DistributedDataParallel modules by their paths in the model, all of one process group."""
        self._wrapped, self._group = tuple(wrapped.values()), group
        self._names = _unwrapped_names(model, wrapped)
        self._averaged = {id(p) for ddp in self._wrapped for p in _averaged(ddp)}
        self._seen: set[str] = set()
        # Those whose gradients have not been compared yet, and how often there was nothing but zeros to compare.
        self._uncompared: dict[str, Tensor] = {}
        self._zeros: Counter[str] = Counter()

    def averages(self, tensor: Tensor) -> bool:
        """Whether the wrapper makes a parameter's gradients the same on all ranks."""
        return id(tensor) in self._averaged

    def name(self, name: str, parameter: Tensor) -> str:
        return self._names.get((id(parameter), name), name)

    def check_step(self) -> None:
        """Refuses to wait for ranks that take no step.

        Raises:
            RuntimeError: within the wrapper's `join()`.
        """
        # torch's Joinable has no public way to ask.
        joins = (getattr(ddp, "_join_config", None) for ddp in self._wrapped)
        if dist.get_world_size(self._group) > 1 and any(getattr(join, "enable", False) for join in joins):
            raise RuntimeError(
                "Shampoo can't step within DistributedDataParallel.join(): a rank that is out of batches takes no "
                "step, and the others would wait for its blocks; give all ranks the same number of batches"
            )

    def check_alike(self, own: Mapping[str, object]) -> None:
        """Holds what has to be the same on all ranks against the other ranks'.

        Raises:
            SettingsError: on all ranks, naming what differs.
        """
        first, *others = gathered(dict(own), self._group)
        for rank, other in enumerate(others, start=1):
            for key in {**first, **other}:
                here, there = first.get(key, "not there"), other.get(key, "not there")
                if here != there:
                    raise SettingsError(
                        f"{key} is {here!r} on rank 0 of the DistributedDataParallel module, but {there!r} on rank "
                        f"{rank}: it has to be the same on all ranks"
                    )

    @contextmanager
    def together(self) -> Iterator[None]:
        cause: Exception | None = None
        try:
            yield
        except Exception as error:
            cause = error
        told = gathered("" if cause is None else f"{type(cause).__name__}: {cause}", self._group)
        if cause is not None:
            raise cause
        for rank, problem in enumerate(told):
            if problem:
                raise SettingsError(f"rank {rank} of the DistributedDataParallel module refused: {problem}")

    def check_gradients(self) -> None:
        """Compares every parameter's first gradient that is not zero over the ranks, on all of them at once.

        A wrapper averages the gradients of what was trained when it was made, and no others.

        Raises:
            RuntimeError: on all ranks, naming the first that differs.
        """
        own = {name: parameter.grad for name, parameter in self._uncompared.items() if parameter.requires_grad}
        if not any(gradient is not None and gradient.layout == torch.strided for gradient in own.values()):
            return
        sums = _check_equal(
            {name: (self._uncompared[name], gradient) for name, gradient in own.items()},
            "has other gradients on some ranks: DistributedDataParallel averages what was trained when it was made, "
            "and nothing else; make it anew after every change of requires_grad",
            self._group,
        )
        for name, total in sums.items():
            self._zeros[name] += total == 0 and own[name] is not None
            if total or self._zeros[name] == _ZEROS:
                del self._uncompared[name]

    def partition(self, members: Sequence[LogicalParameter], stand_ins: Sequence[Tensor]) -> Partition:
        super().partition(members, stand_ins)
        for parameter in members:
            if not self.averages(parameter.tensor):
                raise SettingsError(
                    f"parameter '{parameter.name}' is not of the DistributedDataParallel module whose ranks share the "
                    "blocks: give it an optimizer of its own"
                )
        new = [p for p in members if p.name not in self._seen and not p.tensor.is_meta]
        _check_equal(
            {p.name: (p.tensor, p.tensor) for p in new},
            "has other values on some ranks: DistributedDataParallel makes them equal when it is made, so change them "
            "on all ranks alike, or before that",
            self._group,
        )
        self._seen |= {p.name for p in new}
        self._uncompared.update({p.name: p.tensor for p in new})
        return replicated(members, self._group, missing_alike=True)


def _averaged(ddp: DistributedDataParallel) -> list[Tensor]:
    """The parameters that a wrapper keeps equal over its ranks."""
    ignored = set(ddp.parameters_to_ignore)
    return [p for name, p in ddp.module.named_parameters() if name not in ignored]


def _unwrapped_names(model: nn.Module, paths: Iterable[str]) -> dict[tuple[int, str], str]:
    """By parameter and its name in the wrapped model, its name in the model without wrappers."""
    prefixes = [f"{path}." if path else "" for path in paths]
    found: dict[tuple[int, str], str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        for prefix in prefixes:
            if name.startswith(prefix + _WRAPPED):
                found[id(parameter), name] = prefix + name.removeprefix(prefix + _WRAPPED)
    return found


def _check_equal(
    tensors: Mapping[str, tuple[Tensor, Tensor | None]], what: str, group: dist.ProcessGroup
) -> dict[str, int]:
    """Compares tensors over the ranks by sums of their bits.

    Args:
        tensors: by name, each parameter and what is compared of it, nothing where it has none.

    Returns:
        The sums: 0 for nothing, and for zeros alone.

    Raises:
        RuntimeError: on all ranks, naming the first that differs.
    """
    if not tensors:
        return {}
    sums = torch.stack(
        [
            torch.zeros((), dtype=torch.int64, device=parameter.device)
            if tensor is None or tensor.layout != torch.strided
            else _bits(tensor)
            for parameter, tensor in tensors.values()
        ]
    )
    extremes = torch.stack([sums, -sums])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    for name, differs in zip(tensors, (extremes[0] != -extremes[1]).tolist(), strict=True):
        if differs:
            raise RuntimeError(f"parameter '{name}' {what}")
    return dict(zip(tensors, sums.tolist(), strict=True))


def _bits(tensor: Tensor) -> Tensor:
    """A sum over a tensor's bits, a number on its device."""
    flat = tensor.detach().contiguous().view(-1)
    return flat.view(_BITS[flat.element_size()]).sum(dtype=torch.int64)
