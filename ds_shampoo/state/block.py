"""What the state of one block has to be, so that taking it up can't fail half-way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, ValidationError
from torch import Tensor

from ds_shampoo.algorithm.blocks import Block
from ds_shampoo.algorithm.triangle import packed_numel
from ds_shampoo.state.index import Count


class _State(BaseModel):
    """What it does not name, some other release may know."""

    model_config = ConfigDict(strict=True, extra="ignore", arbitrary_types_allowed=True)


def _no_tensor(order: object) -> object:
    """One of a single number would pass for that."""
    if isinstance(order, Tensor):
        raise ValueError("must be a number, not a tensor")
    return order


class _Pending(_State):
    begun_at: Count
    due_at: Count
    snapshots: list[Tensor]
    corrections: list[FiniteFloat]
    updates: Count


class _BlockState(_State):
    origin: list[Count]
    shape: list[Count]
    factors: list[Tensor]
    roots: list[Tensor]
    previous: list[Tensor] = []
    updates: Count
    ready: bool
    rooted: list[Tensor]
    rooted_traces: list[FiniteFloat]
    rooted_updates: list[Count]
    solved: list[bool]
    failures: Count
    setbacks: Count
    rooted_at: Count
    order: Annotated[FiniteFloat, BeforeValidator(_no_tensor), Field(ge=0, multiple_of=0.5)] = 0
    pending: _Pending | None = None


def misfit(state: Mapping[str, Any], block: Block) -> str:
    """Why a block can't have this state, which `blocks_state` gave of it once; empty if it can."""
    try:
        found = _BlockState.model_validate(dict(state))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        return f"its {'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    packed = [(packed_numel(dim),) for dim in block.factor_dims]
    whole = [(dim, dim) for dim in block.factor_dims]
    if (found.origin, found.shape) != (list(block.origin), list(block.shape)):
        return f"its place is {found.origin}, {found.shape}, not {list(block.origin)}, {list(block.shape)}"
    problems = [
        _shapes("factors", found.factors, packed),
        _shapes("roots", found.roots, whole),
        _shapes("previous", found.previous, [block.shape] * len(found.previous[:1])),
        # Before the first root there is nothing that one was made of.
        _shapes("rooted", found.rooted, whole) if len(found.rooted) >= len(packed) else "",
        *(
            f"its {name} are {len(each)}, not {len(packed)}"
            for name, each in (
                ("solved", found.solved),
                ("rooted_traces", found.rooted_traces),
                ("rooted_updates", found.rooted_updates),
            )
            if len(each) != len(packed)
        ),
    ]
    if found.pending is not None:
        problems.append(_shapes("pending.snapshots", found.pending.snapshots, packed))
        if len(found.pending.corrections) != len(packed):
            problems.append(f"its pending.corrections are {len(found.pending.corrections)}, not {len(packed)}")
    return next(filter(None, problems), "")


def _shapes(name: str, tensors: Sequence[Tensor], expected: Sequence[tuple[int, ...]]) -> str:
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if shapes != list(expected):
        return f"its {name} have the shapes {shapes}, not {list(expected)}"
    integers = [str(tensor.dtype) for tensor in tensors if not tensor.is_floating_point()]
    return f"its {name} are of {integers[0]}, not floating-point numbers" if integers else ""
