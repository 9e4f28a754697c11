"""Inverse p-th roots of symmetric positive semi-definite matrices, in fp64 on the host."""

from ds_shampoo.algorithm.inverse_roots.chain import METHODS, ZERO_BELOW, InverseRoot, Outcome, inverse_root
from ds_shampoo.algorithm.inverse_roots.pieces import StoppedError, ask_between_pieces, between_pieces

__all__ = [
    "METHODS",
    "ZERO_BELOW",
    "InverseRoot",
    "Outcome",
    "StoppedError",
    "ask_between_pieces",
    "between_pieces",
    "inverse_root",
]
