"""The elementwise half of a step on the tensors of a param group: whole parameters, or ZeRO's flat shard."""

from __future__ import annotations

import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ds_shampoo.algorithm import grafting
from ds_shampoo.algorithm.momentum import MomentumSchedule
from ds_shampoo.algorithm.multi_tensor import TorchKernels, kernels_for
from ds_shampoo.auxiliary import RoleSettings, SettingsRole
from ds_shampoo.config import GroupSettings
from ds_shampoo.step.segments import Alike, Runs, alike

# Small enough for the arrays of a step to stay in a CPU's cache between passes, large enough to hide the cost of
# calling an operation; the best of 32K to 1024K by `benchmarks/step_time.py`, 8 per cent ahead of 32K.
_CPU_CHUNK = 256 * 1024
# Small tensors are taken together, up to where an operation takes far longer than its call: on a CPU by timing (at 64K
# making results apart and copying them in costs more), on an accelerator by the memory of such results, 16 MiB.
_CPU_TOGETHER = 16 * 1024
_TOGETHER = 4 * 1024 * 1024
# Elements of fp32 in a cache line.
_ALIGNMENT = 16

# What tensors have in common that are worked on together.
_Kind: TypeAlias = tuple[torch.device, int, torch.dtype, SettingsRole]

MOMENTS = ("exp_avg", "exp_avg_sq")


def new_state(param: Tensor) -> dict[str, Any]:
    """Adam's names, so that DeepSpeed's checkpoint and fragment interfaces find what they expect; all fp32."""
    return {
        "step": 0,
        "exp_avg": torch.zeros(param.shape, dtype=torch.float32, device=param.device),
        "exp_avg_sq": torch.zeros(param.shape, dtype=torch.float32, device=param.device),
    }


class StepMemory:
    """Memory for the length of a step: on a CPU the same every time, since fresh pages cost it more than arithmetic.

    An accelerator's caching allocator does as much by itself, and lends the memory to others meanwhile.
    """

    def __init__(self) -> None:
        self._flat = torch.empty(0, dtype=torch.float32, device="cpu")
        self._used = 0

    @property
    def bytes(self) -> int:
        return self._flat.nbytes

    def restart(self) -> None:
        """What was given out is free again; there is room for as much as was asked for at most."""
        if self._used > self._flat.numel():
            self._flat = torch.empty(self._used, dtype=torch.float32, device="cpu")
        self._used = 0

    def empty_like(self, tensor: Tensor) -> Tensor:
        """An uninitialised tensor like this one, flat and fp32."""
        if tensor.device.type != "cpu":
            return torch.empty_like(tensor)
        begin = self._used
        self._used += math.ceil(tensor.numel() / _ALIGNMENT) * _ALIGNMENT
        return (
            self._flat[begin : begin + tensor.numel()]
            if self._used <= self._flat.numel()
            else torch.empty(tensor.shape, dtype=torch.float32, device=tensor.device)
        )


class TensorStep:
    """One tensor in one step; everything flat and fp32 but the parameter itself.

    Attributes:
        grad: the gradient, with the L2 decay added where that is asked for.
        vector: what is preconditioned: the filtered gradient, or the gradient for momentum "after".
        update: the grafting method's own step for it, until directions are written over it.
        step: its count, this step included.
        runs: of which roles its elements are.
    """

    def __init__(
        self,
        param: Tensor,
        grad: Tensor,
        state: dict[str, Any],
        *,
        settings: GroupSettings,
        by_role: Mapping[SettingsRole, RoleSettings],
        memory: StepMemory,
        runs: Runs,
    ) -> None:
        self.param, self._state, self.runs = param, state, runs
        self.step = int(state["step"]) + 1  # a tensor on the host where a framework keeps it as torch's Adam does
        self.exp_avg: Tensor = state["exp_avg"].view(-1)
        self.exp_avg_sq: Tensor = state["exp_avg_sq"].view(-1)
        self.grad = grad.reshape(-1).to(torch.float32)
        if not settings.decoupled_weight_decay:
            self._add_decay({role: own.weight_decay for role, own in by_role.items()})
        self.vector = memory.empty_like(self.grad) if settings.momentum == "before" else self.grad
        self.update = memory.empty_like(self.grad)

    def count(self) -> None:
        """Counts the step in the tensor's state."""
        self._state["step"] += 1

    def _add_decay(self, decays: Mapping[SettingsRole, float]) -> None:
        """Takes the L2 decay into the gradient, which stays as it is where others see it."""
        segments, flat = self.runs.segments(alike(decays)), self.param.reshape(-1)
        if len(segments) == 1:
            decay = decays[segments[0].role]
            self.grad = self.grad.add(flat, alpha=decay) if decay else self.grad
            return
        self.grad = self.grad.clone()
        for role in dict.fromkeys(segment.role for segment in segments if decays[segment.role]):
            parts = [segment.part for segment in segments if segment.role == role]
            views = [self.grad[part] for part in parts], [flat[part] for part in parts]
            torch._foreach_add_(*views, alpha=decays[role])


class ElementwiseStep:
    """What the tensors of a group go through together in one step.

    Roles whose settings differ in what a half of it goes by are worked on apart in that half; a job that sets their
    rates alone has its moments as if it had set nothing.
    """

    def __init__(
        self, tensors: Sequence[TensorStep], settings: GroupSettings, by_role: Mapping[SettingsRole, RoleSettings]
    ) -> None:
        """`by_role` is what `settings_by_role` makes of the settings."""
        self._tensors, self._settings = tensors, settings
        self._grads, self._vectors = [t.grad for t in tensors], [t.vector for t in tensors]
        self._updates = [t.update for t in tensors]
        self._exp_avgs, self._exp_avg_sqs = [t.exp_avg for t in tensors], [t.exp_avg_sq for t in tensors]
        first = alike({role: (s.betas, s.eps) for role, s in by_role.items()})
        after = settings.momentum == "after"
        last = alike({role: (s.lr, s.weight_decay, s.betas[0] if after else None) for role, s in by_role.items()})
        self._batches = list(_batches(tensors, by_role, first))
        self._last_batches = self._batches if last == first else list(_batches(tensors, by_role, last))

    def filter_and_graft(self) -> None:
        """Moments, the vectors and their grafting steps, in one pass over the data."""
        for batch in self._batches:
            self._filter(batch)
            self._graft(batch, self._grads, self._vectors)

    def filter(self) -> None:
        """The vectors alone, for a grafting method that must know norms before it can go on."""
        for batch in self._batches:
            self._filter(batch)

    def graft(self, grads: Sequence[Tensor], vectors: Sequence[Tensor]) -> None:
        """The grafting steps, for each tensor's gradient and vector as divided by their norms."""
        for batch in self._batches:
            self._graft(batch, grads, vectors)

    def finish(self) -> None:
        """Momentum "after", weight decay and the step on the parameters; updates are spent."""
        flat = [t.param.reshape(-1) for t in self._tensors]  # copies of those that can't be viewed so
        for batch in self._last_batches:
            updates, own = batch.of(self._updates), batch.settings
            if self._settings.momentum == "after":
                self._average(batch, updates, updates)
            decay = own.weight_decay if self._settings.decoupled_weight_decay else 0.0
            batch.kernels.apply_update(batch.of(flat), updates, own.lr, decay)
        for tensor, values in zip(self._tensors, flat, strict=True):
            if not tensor.param.is_contiguous():
                tensor.param.copy_(values.view(tensor.param.shape))

    def _filter(self, batch: _Batch) -> None:
        if self._settings.momentum == "before":
            self._average(batch, batch.of(self._grads), batch.of(self._vectors))

    def _average(self, batch: _Batch, values: list[Tensor], outs: list[Tensor]) -> None:
        s, exp_avgs = self._settings, batch.of(self._exp_avgs)
        schedule = MomentumSchedule(batch.settings.betas[0], s.momentum_warmup_steps, s.momentum_warmup_start)
        grafting.average(batch.kernels, values, exp_avgs, outs, step=batch.step, schedule=schedule, nesterov=s.nesterov)

    def _graft(self, batch: _Batch, grads: Sequence[Tensor], vectors: Sequence[Tensor]) -> None:
        grafting.grafting_step(
            batch.kernels,
            self._settings.grafting,
            vectors=batch.of(vectors),
            grads=batch.of(grads),
            exp_avg_sqs=batch.of(self._exp_avg_sqs),
            outs=batch.of(self._updates),
            step=batch.step,
            beta2=batch.settings.betas[1],
            eps=batch.settings.eps,
        )


class _Batch(NamedTuple):
    """What is worked on at once: several parts of tensors, of one device, step count and settings, or a single one."""

    kernels: TorchKernels
    step: int
    settings: RoleSettings
    parts: Sequence[tuple[int, slice]]

    def of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The batch's own, out of one flat tensor for each of the group's."""
        return [tensors[index][part] for index, part in self.parts]


def _batches(
    tensors: Sequence[TensorStep], settings: Mapping[SettingsRole, RoleSettings], same: Alike
) -> Iterator[_Batch]:
    """All elements of the tensors in batches; their number grows with that of elements, not with that of segments.

    Args:
        same: of the settings in use; any of those that are alike there will do.
    """
    small: dict[tuple[_Kind, int], list[tuple[int, slice]]] = defaultdict(list)
    held: Counter[_Kind] = Counter()
    for index, tensor in enumerate(tensors):
        device = tensor.grad.device
        chunk, together = _limits(device)
        for part, role in tensor.runs.segments(same):
            start, stop, _ = part.indices(tensor.grad.numel())
            if stop - start > together:
                for at in range(start, stop, chunk):
                    own = slice(at, min(at + chunk, stop))
                    yield _Batch(kernels_for(device), tensor.step, settings[role], [(index, own)])
            elif stop > start:
                kind = device, tensor.step, tensor.param.dtype, role
                small[kind, held[kind] // together].append((index, part))
                held[kind] += stop - start
    for ((device, step, _, role), _), parts in small.items():
        yield _Batch(kernels_for(device), step, settings[role], parts)


def _limits(device: torch.device) -> tuple[int, int]:
    """How many elements of a single tensor are worked on at once; up to how many a tensor shares a batch."""
    return (_CPU_CHUNK, _CPU_TOGETHER) if device.type == "cpu" else (sys.maxsize, _TOGETHER)
