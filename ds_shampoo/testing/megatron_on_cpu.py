"""Lets Megatron-core run on a machine without CUDA, for tests and small trials; does nothing where CUDA is there.

Megatron asks for CUDA's current device and random state in places that have nothing else to do with it. What stands in
for them here is the CPU's. Nothing of this belongs in a job on GPUs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ds_shampoo.frameworks.megatron import internals

_CPU = torch.device("cpu")


@functools.cache
def stand_in() -> None:
    """Puts the CPU in CUDA's place for Megatron; to be called before the model is built, again to no effect."""
    if torch.cuda.is_available():
        return
    internals.stand_in_for_cuda(
        get_rng_state=_get_rng_state,
        set_rng_state=_set_rng_state,
        causal_mask=_causal_mask,  # it is recomputed in backward, where no mode is in force
        norm=_norm,
    )
    cudas: dict[str, Callable[..., Any]] = {
        "current_device": lambda: _CPU,
        "current_stream": lambda device=None: torch.cpu.current_stream(),  # 0.19 asks for it
        "get_rng_state": _get_rng_state,
        "set_rng_state": _set_rng_state,
        "manual_seed": torch.manual_seed,
        "synchronize": lambda: None,
    }
    for name, function in cudas.items():
        setattr(torch.cuda, name, function)
    setattr(Tensor, "cuda", _stay)  # noqa: B010
    setattr(nn.Module, "cuda", _stay)  # noqa: B010
    _ToCPU().__enter__()  # type: ignore[no-untyped-call]


class _ToCPU(TorchFunctionMode):
    """Makes tensors that are asked for on CUDA on the CPU, where they say that they are on CUDA."""

    def __torch_function__(
        self, function: Any, types: Iterable[type], arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        if function is Tensor.type and len(arguments) == 1 and not named:
            return function(*arguments).replace("torch.", "torch.cuda.", 1)
        named = dict(named or {})
        device = named.get("device")
        if device is not None and torch.device(device).type == "cuda":
            named["device"] = _CPU
        return function(*arguments, **named)


def _norm(_: type, config: Any, hidden_size: int, eps: float = 1e-5, **__: Any) -> nn.Module:
    """Torch's norm, under sequence parallelism too, where Megatron wants one that marks its parameters."""
    kind: Any = {"LayerNorm": nn.LayerNorm, "RMSNorm": nn.RMSNorm}[config.normalization]
    norm: nn.Module = kind(hidden_size, eps=eps)
    for parameter in norm.parameters():
        internals.mark_part_of_sequence(parameter, config.sequence_parallel)
    return norm


def _causal_mask(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device="cpu").triu(1)


def _stay(self: Any, *_: Any, **__: Any) -> Any:
    return self


def _get_rng_state(*_: Any, **__: Any) -> Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(state)
