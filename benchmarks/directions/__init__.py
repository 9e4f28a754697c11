"""Trials of directions: prototypes on a small modern GPT, each in one process, before any enters the package."""
