"""Tokenizers trained on the corpus at hand, with the names by which Megatron's datasets ask for special tokens."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

# GPT's one special token, and BERT's.
END = "<|endoftext|>"
PAD, CLS, SEP, MASK, UNKNOWN = BERT_TOKENS = "[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"


def train_bpe(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE, as GPT-2's; every text has tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_wordpiece(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """An uncased WordPiece, as BERT's; a continuation begins with "##", which masking of whole words relies on."""
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=list(BERT_TOKENS))
    )
    return tokenizer


class MegatronTokenizer:
    """A trained tokenizer under the names that `megatron.core.datasets` uses.

    Attributes:
        unique_identifiers: what the datasets' cache is keyed by.
    """

    def __init__(self, path: Path) -> None:
        """Reads what `Tokenizer.save` wrote."""
        self._tokenizer = Tokenizer.from_file(str(path))
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.unique_identifiers = OrderedDict({"class": type(self).__name__, "path": str(path)})

    @cached_property
    def inv_vocab(self) -> dict[int, str]:
        """Tokens by number, in the order of numbers: BERT's random words are drawn by their place here."""
        return {number: self._tokenizer.id_to_token(number) for number in range(self.vocab_size)}

    @property
    def eod(self) -> int:
        """The end of a document: GPT's one special token, BERT's separator."""
        return self.sep if self._tokenizer.token_to_id(END) is None else self._special(END)

    @property
    def pad(self) -> int:
        """GPT pads with a token that never is in the text."""
        found = self._tokenizer.token_to_id(PAD)
        return -1 if found is None else int(found)

    @property
    def cls(self) -> int:
        return self._special(CLS)

    @property
    def sep(self) -> int:
        return self._special(SEP)

    @property
    def mask(self) -> int:
        return self._special(MASK)

    def _special(self, token: str) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise ValueError(f"this tokenizer has no {token}: it was made for the other kind of model")
        return int(found)


def describe(tokenizer: Tokenizer) -> str:
    return f"{json.loads(tokenizer.to_str())['model']['type']} of {tokenizer.get_vocab_size()} tokens"
