"""Makes the GPT that a configuration names."""

from __future__ import annotations

from gpt.model import GPT, GPTConfig
from gpt.modern import ModernGPT


def build_gpt(config: GPTConfig) -> GPT | ModernGPT:
    """A new model of `config.architecture`; its forward takes tokens and targets and gives the loss."""
    return ModernGPT(config) if config.architecture == "modern" else GPT(config)
