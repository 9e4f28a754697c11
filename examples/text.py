"""Real text for the examples: each byte is a token, so that nothing has to be downloaded."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor
from torch.utils.data import Dataset

VOCABULARY = 256


class Windows(Dataset[dict[str, Tensor]]):
    """A text's windows of `context` bytes, as Hugging Face's causal models take them: they shift the labels."""

    def __init__(self, text: bytes, context: int) -> None:
        self._tokens = torch.tensor(list(text), dtype=torch.long)
        self._context = context

    def __len__(self) -> int:
        return len(self._tokens) // self._context

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self._tokens[index * self._context : (index + 1) * self._context]
        return {"input_ids": window, "labels": window}


def read(path: Path | None) -> str:
    """A text file, or 0.7 MB of English that come with Python: its language reference."""
    return path.read_text("utf-8") if path else "\n\n".join(topics.values())


def train_and_validation(path: Path | None, context: int) -> tuple[Windows, Windows]:
    """The windows of a text; the last fiftieth of it is held out."""
    text = read(path).encode()
    cut = len(text) - len(text) // 50
    return Windows(text[:cut], context), Windows(text[cut:], context)
