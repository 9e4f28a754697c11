"""A corpus as tokens: no byte is lost, the tokenizer is trained once, and losses per byte are what they are called."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

import tokenization
from gpt.data import Corpus, CorpusError, load_corpus
from gpt.model import GPTConfig
from gpt.task import GPTTask, add_arguments, config_of
from gpt.tokens import PIECE, TokenCorpus, as_bpe, as_bytes
from sampling import draw

CONTEXT, VOCABULARY = 16, 320
DOCS = Path(__file__).resolve().parents[3] / "docs"


@pytest.fixture(scope="module")
def text() -> Corpus:
    return load_corpus(DOCS / "algorithm.md", CONTEXT)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def bpe(text: Corpus, cache: Path) -> TokenCorpus:
    return as_bpe(text, VOCABULARY, CONTEXT, cache)


def corpus_of(train: str, encoding: str = "utf-8") -> Corpus:
    return Corpus("noise", *(np.frombuffer(part.encode(encoding), np.uint8) for part in (train, train[:500])))


class Certain(nn.Module):
    """A model whose loss is the same for every token."""

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return torch.tensor(2.0)


def test_tokens_stand_for_every_byte_of_the_text(text: Corpus, bpe: TokenCorpus, cache: Path) -> None:
    assert text.train.size > PIECE
    (folder,) = cache.iterdir()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for tokens, part in ((bpe.train, text.train), (bpe.validation, text.validation)):
        assert tokenizer.decode(tokens.tolist(), skip_special_tokens=False).encode() == part.tobytes()
        assert bpe.widths[tokens].sum() == part.size
    assert len(bpe.widths) == VOCABULARY
    assert bpe.bytes_per_token == pytest.approx(text.train.size / bpe.train.size)
    assert 1.2 < bpe.bytes_per_token < 4


def test_an_end_of_text_in_the_text_is_as_wide_as_it_is_written(tmp_path: Path) -> None:
    written = corpus_of(f"one{tokenization.END}two, three; four\n" * 60)
    tokens = as_bpe(written, 270, CONTEXT, tmp_path)
    assert tokens.widths[tokens.train].sum() == written.train.size
    assert tokens.widths[0] == len(tokenization.END) == 13


def test_a_tokenizer_is_trained_on_the_training_text_once(
    text: Corpus, bpe: TokenCorpus, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, train = [], tokenization.train_bpe

    def train_bpe(texts: Any, vocabulary: int) -> Tokenizer:
        calls.append(list(texts))
        return train(calls[-1], vocabulary)

    monkeypatch.setattr(tokenization, "train_bpe", train_bpe)
    again = as_bpe(text, VOCABULARY, CONTEXT, cache)
    assert not calls
    assert again.tokenizer == bpe.tokenizer
    assert np.array_equal(again.train, bpe.train)
    other = as_bpe(text, VOCABULARY + 1, CONTEXT, cache)
    assert ["".join(call).encode() for call in calls] == [text.train.tobytes()]
    assert other.tokenizer != bpe.tokenizer


def test_a_character_that_the_split_cut_is_left_out(tmp_path: Path) -> None:
    whole = corpus_of("Übergrößenträger sind rar und schön.\n" * 50)
    cut = Corpus("noise", whole.train[:-1], whole.validation[1:])
    tokens = as_bpe(cut, 280, CONTEXT, tmp_path)
    assert tokens.widths[tokens.train].sum() == cut.train.size
    assert tokens.widths[tokens.validation].sum() == cut.validation.size - 1  # the second half of Ü


@pytest.mark.parametrize(
    ("corpus", "vocabulary", "context", "message"),
    [
        (corpus_of("größer\n" * 100, "latin-1"), 260, 8, "noise: 200 of 700 bytes are not UTF-8"),
        (corpus_of("abc\n" * 200), 5000, 8, "noise: too small for a vocabulary of 5000: its text makes 2.. tokens"),
        (corpus_of("what a fine day it is\n" * 40), 262, 4000, "noise: too small: .* tokens, context 4000"),
    ],
)
def test_a_text_that_cannot_be_tokenized_is_refused(
    tmp_path: Path, corpus: Corpus, vocabulary: int, context: int, message: str
) -> None:
    with pytest.raises(CorpusError, match=message):
        as_bpe(corpus, vocabulary, context, tmp_path)


def test_losses_are_per_byte_and_per_token(bpe: TokenCorpus) -> None:
    task = GPTTask(bpe, GPTConfig(context=CONTEXT, vocab=VOCABULARY), eval_windows=20)
    batches = [task.validation_batch(number) for number in range(task.validation_size)]
    sums = torch.stack([task.measure(Certain(), batch) for batch in batches]).sum(0)
    size = sum(int(bpe.widths[batch[1]].sum()) for batch in batches)
    found = task.summary(sums)
    assert found["val_loss_per_token"] == 2.0
    assert found["val_loss"] == pytest.approx(2.0 * 20 * CONTEXT / size)
    assert task.training_record(3.0) == {"loss": 3.0 / bpe.bytes_per_token, "loss_per_token": 3.0}
    assert "nats per byte" in task.describe()


def test_the_loss_of_a_window_is_shared_out_over_all_its_tokens(bpe: TokenCorpus) -> None:
    torch.manual_seed(0)
    task = GPTTask(bpe, GPTConfig(1, 32, 2, CONTEXT, VOCABULARY, "modern"), eval_windows=12)
    model, batches = task.model(), [task.validation_batch(number) for number in range(2)]
    assert [len(batch[0]) for batch in batches] == [8, 4]
    whole = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    found = task.summary(sum(task.measure(model, batch) for batch in batches))
    assert found["val_loss_per_token"] == pytest.approx(model(*whole).item(), rel=1e-5)


def test_bytes_are_told_as_before(text: Corpus) -> None:
    task = GPTTask(as_bytes(text), GPTConfig(context=CONTEXT), eval_windows=8)
    assert task.training_record(3.0) == {"loss": 3.0}
    assert task.summary(task.measure(Certain(), task.validation_batch(0))) == {"val_loss": 2.0}
    assert task.describe() == text.describe()


def test_a_training_batch_is_windows_of_tokens(bpe: TokenCorpus) -> None:
    task = GPTTask(bpe, GPTConfig(context=CONTEXT, vocab=VOCABULARY), eval_windows=8)
    samples = draw(task.training_size, seed=0, step=0, part=0, parts=1, samples=4)
    tokens, targets = task.training_batch(samples)
    assert tokens.dtype == targets.dtype == torch.int64
    for place, row, one_on in zip(samples.places, tokens, targets, strict=True):
        assert np.array_equal(row, bpe.train[place : place + CONTEXT])
        assert np.array_equal(one_on, bpe.train[place + 1 : place + CONTEXT + 1])
    assert tokens.max() >= 257


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize(
    ("arguments", "config"),
    [
        ([], GPTConfig()),
        (["--architecture", "modern"], GPTConfig(architecture="modern", mlp="gated")),
        (
            ["--architecture", "modern", "--mlp", "squared_relu", "--vocabulary", "4096", "--heads", "8"],
            GPTConfig(heads=8, vocab=4096, architecture="modern", mlp="squared_relu"),
        ),
    ],
)
def test_the_command_line_gives_the_model(arguments: list[str], config: GPTConfig) -> None:
    assert config_of(parse(*arguments)) == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--architecture", "llama"], "invalid choice: 'llama'"),
        (["--vocabulary", "words"], "'words': must be 'bytes' or a number from 258 on"),
        (["--vocabulary", "256"], "'256': must be"),
        (["--vocabulary=-300"], "'-300': must be"),
    ],
)
def test_a_wrong_argument_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(*arguments)
    assert message in capsys.readouterr().err


def test_a_feed_forward_half_that_would_do_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="--mlp gated is for --architecture modern, not gpt2"):
        config_of(parse("--mlp", "gated"))


def test_settings_tell_tokenizers_and_architectures_apart(text: Corpus, bpe: TokenCorpus) -> None:
    config = GPTConfig(context=CONTEXT, vocab=VOCABULARY, architecture="modern")
    settings = json.loads(json.dumps(GPTTask(bpe, config, 8).settings()))
    assert settings["data"]["tokenizer"] == bpe.tokenizer != as_bytes(text).tokenizer
    assert settings["data"]["training_bytes"] == text.train.size
    assert settings["model"] | {"architecture": "modern", "mlp": "gated", "vocab": VOCABULARY} == settings["model"]
