"""Trials of directions: prototypes on a small modern GPT, in one process each, before any of them enters the package."""
