"""The model and the batches that the benchmarks share: the launcher's byte GPT on its corpus."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from gpt.data import Corpus, cut_windows, load_corpus
from gpt.model import GPT, GPTConfig
from sampling import draw

CONTEXT = 256
WINDOWS_PER_STEP = 2
TOKENS_PER_STEP = CONTEXT * WINDOWS_PER_STEP


def build_model(seed: int) -> nn.Module:
    """The 3.3M-parameter GPT; every call with one seed gives the same weights."""
    torch.manual_seed(seed)
    return GPT(GPTConfig(context=CONTEXT))


def corpus(path: Path | None) -> Corpus:
    """The text at `path`, or the launcher's own choice."""
    return load_corpus(path, CONTEXT)


def batch(text: Corpus, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Step `step`'s tokens and targets, int64 [WINDOWS_PER_STEP, CONTEXT]."""
    return windows(text, CONTEXT, seed, step, WINDOWS_PER_STEP)


def windows(text: Corpus, context: int, seed: int, step: int, count: int) -> tuple[Tensor, Tensor]:
    """What one rank alone trains on at step `step`: tokens and targets, int64 [count, context]."""
    samples = draw(text.train.size - context, seed=seed, step=step, part=0, parts=1, samples=count)
    return cut_windows(text.train, samples.places, context)


def hidden_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """By name the 2-D weights between the embeddings and the head: what Muon and Shampoo precondition."""
    outer = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    outer.add(id(model.get_parameter("lm_head.weight")))
    return {name: p for name, p in model.named_parameters() if p.ndim == 2 and id(p) not in outer}
