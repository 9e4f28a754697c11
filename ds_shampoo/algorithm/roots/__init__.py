"""Inverse p-th roots of symmetric positive semi-definite matrices, in fp64 on the host."""

from ds_shampoo.algorithm.roots.chain import METHODS, InverseRoot, Outcome, inverse_root

__all__ = ["METHODS", "InverseRoot", "Outcome", "inverse_root"]
