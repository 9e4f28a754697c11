"""Triton kernels for what torch has no single launch for; each has a plain path beside it that says what it does."""
