"""How long a direction is: brought to its grafting step's norm, or to a fixed one (section 4 of docs/algorithm.md)."""

from __future__ import annotations

import torch
from torch import Tensor


def target_squares(grafted: Tensor, numel: int, direction_rms: float | str, grafting: str) -> Tensor | None:
    """The squared norms that directions are brought to; None to leave them as they are.

    Args:
        grafted: [n] fp32, the squared norms of the blocks' grafting steps.
        numel: of a block.
        direction_rms, grafting: the settings of these names.
    """
    if isinstance(direction_rms, float):
        return torch.full_like(grafted, direction_rms**2 * numel).add_(grafted - grafted)  # NaN stays
    return grafted if grafting != "none" else None


def rescaled(directions: Tensor, squares: Tensor | None) -> Tensor:
    """Stacked directions [n, *shape], each brought to the norm whose square is given; zero is what has no direction.

    That is a zero one, and one that overflowed: products of roots of a low order can, where gradients vanish. Where the
    grafting step itself is not finite NaN is what comes out, as without blocks: zero would hide it for ever.
    """
    if squares is None:
        return directions
    norms = torch.linalg.vector_norm(directions.flatten(1), dim=1)
    pointing = (norms > 0) & norms.isfinite()
    scale = torch.where(pointing, squares.sqrt() / norms, squares - squares)
    each = -1, *(1,) * (directions.dim() - 1)
    # Zero times infinity is no zero. A host that can know at once saves itself the pass over the data.
    if directions.device.type != "cpu" or not bool(pointing.all()):
        directions.masked_fill_(~pointing.view(each), 0.0)
    return directions.mul_(scale.view(each))
