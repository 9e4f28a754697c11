"""A corpus as a model's tokens: its bytes, or a byte-level BPE trained on it once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

import tokenization
from corpora import DATA
from gpt.data import Bytes, Corpus, CorpusError
from vocabulary import Tokens, tokenized

# A vocabulary of bytes, and the smallest one of BPE: every byte, the end of a text, and a pair.
BYTES = "bytes"
SMALLEST_BPE = 258

# A BPE is trained and applied in pieces of about so many characters, which end with a line.
PIECE = 1 << 14
# Bytes that are not UTF-8 are left out where they are this rare, and few where documents were cut; more is refused.
STRAY_PART, STRAY_BYTES = 1e-3, 16


@dataclass(frozen=True)
class TokenCorpus:
    """Training and validation text as tokens.

    Attributes:
        text: what the tokens were made of.
        tokenizer: what made them, in words that differ where they do.
        widths: the bytes that each token of the vocabulary stands for, int64 [vocabulary].
    """

    text: Corpus
    tokenizer: str
    train: Bytes | Tokens
    validation: Bytes | Tokens
    widths: Tensor

    @property
    def bytes_per_token(self) -> float:
        """The mean over the training text."""
        counts = np.bincount(self.train, minlength=len(self.widths))
        return float(counts @ self.widths.numpy() / counts.sum())


def as_bytes(corpus: Corpus) -> TokenCorpus:
    """Every byte is a token."""
    widths = torch.ones(256, dtype=torch.int64)
    return TokenCorpus(corpus, BYTES, corpus.train, corpus.validation, widths)


def as_bpe(corpus: Corpus, vocabulary: int, context: int, cache: Path | None = None) -> TokenCorpus:
    """Tokens of a byte-level BPE that was trained on the training text; kept in `cache` for every later call.

    Args:
        vocabulary: tokens that the BPE has, at least SMALLEST_BPE.
        context: the length of the windows that will be drawn, in tokens.
        cache: a folder (default: `.tokenized` below the corpora).

    Raises:
        CorpusError: where the text is not UTF-8, or too small for this vocabulary or context.
    """
    parts = {"train": corpus.train, "validation": corpus.validation}
    texts = {name: list(_pieces(_decode(part, corpus.source))) for name, part in parts.items()}
    found = tokenized(texts, vocabulary, tokenization.train_bpe, cache or DATA / ".tokenized")
    made = found.tokenizer.get_vocab_size()
    if made != vocabulary:
        raise CorpusError(f"{corpus.source}: too small for a vocabulary of {vocabulary}: its text makes {made} tokens")
    tokens = {name: found.flat(name) for name in parts}
    for name, part in tokens.items():
        if part.size <= context:
            raise CorpusError(f"{corpus.source}: too small: {part.size} {name} tokens, context {context} needs more")
    mark = hashlib.sha256(found.tokenizer.to_str().encode()).hexdigest()[:12]
    described = f"{tokenization.describe(found.tokenizer)} ({mark})"
    return TokenCorpus(corpus, described, **tokens, widths=_widths(found.tokenizer))


def _decode(part: Bytes, source: str) -> str:
    text = part.tobytes().decode("utf-8", "ignore")
    stray = part.size - len(text.encode())
    if stray > max(STRAY_BYTES, STRAY_PART * part.size):
        raise CorpusError(f"{source}: {stray} of {part.size} bytes are not UTF-8, which a BPE vocabulary needs")
    return text


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        line_end = text.find("\n", start + PIECE)
        end = len(text) if line_end < 0 else line_end + 1
        yield text[start:end]
        start = end


def _widths(tokenizer: Tokenizer) -> Tensor:
    # A byte-level BPE writes a token as one character for each byte; its special token is in ASCII, and so fits.
    return torch.tensor([len(tokenizer.id_to_token(token)) for token in range(tokenizer.get_vocab_size())])
