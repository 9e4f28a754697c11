"""The masked language model's task: what is masked, and that only seed and step decide it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import bert.task
from bert.model import BertConfig
from bert.task import BertTask
from sampling import draw
from tokenization import MASK, train_wordpiece
from vocabulary import tokenized

ROOT = Path(__file__).resolve().parents[3]
CONFIG = BertConfig(layers=1, d_model=32, heads=2, context=64, vocab=300)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> BertTask:
    lines = (ROOT / "docs" / "algorithm.md").read_text().splitlines()
    texts = {"train": lines[:-40], "validation": lines[-40:]}
    return BertTask("docs", tokenized(texts, CONFIG.vocab, train_wordpiece, tmp_path_factory.mktemp("cache")), CONFIG)


def test_so_many_are_asked_for_and_most_of_those_masked(task: BertTask) -> None:
    samples = draw(task.training_size, seed=0, step=3, part=0, parts=1, samples=400)
    shown, places, targets = task.training_batch(samples)
    windows = torch.from_numpy(np.stack([task._train[at : at + 64] for at in samples.places])).long()
    assert torch.equal(targets, windows.flatten()[places])
    assert len(places) == 400 * round(0.15 * 64)
    assert len(set(places.tolist())) == len(places)
    hidden = shown.flatten()[places]
    masked = (hidden == task._mask).float().mean().item()
    kept = (hidden == targets).float().mean().item()
    # Four standard deviations of 4,000 draws.
    assert masked == pytest.approx(0.8, abs=0.03)
    assert kept == pytest.approx(0.1, abs=0.02)
    unasked = torch.ones(shown.numel(), dtype=torch.bool)
    unasked[places] = False
    assert torch.equal(shown.flatten()[unasked], windows.flatten()[unasked])


def test_masks_are_the_same_for_any_number_of_parts(task: BertTask) -> None:
    def batch(part: int, parts: int) -> torch.Tensor:
        samples = draw(task.training_size, seed=0, step=3, part=part, parts=parts, samples=8 // parts)
        return task.training_batch(samples)[0]

    assert torch.equal(batch(0, 1), torch.cat([batch(0, 2), batch(1, 2)]))


def test_validation_asks_the_same_every_time(task: BertTask) -> None:
    for first, again in zip(task.validation_batch(0), task.validation_batch(0), strict=True):
        assert torch.equal(first, again)


@torch.no_grad()
def test_the_metrics_are_those_of_the_whole(task: BertTask) -> None:
    torch.manual_seed(0)
    model = task.model().eval()
    batch = task.validation_batch(0)
    found = task.summary(task.measure(model, batch))
    assert found["val_loss"] == pytest.approx(model(*batch).item(), rel=1e-5)
    assert 0 <= found["val_accuracy"] < 0.2


def test_a_tokenizer_is_trained_once(tmp_path: Path) -> None:
    calls = []

    def train(texts: object, vocabulary: int) -> object:
        calls.append(vocabulary)
        return train_wordpiece(texts, vocabulary)

    texts = {"train": ["to be or not to be", "", "that is the question"], "validation": ["to question"]}
    first, second = (tokenized(texts, 60, train, tmp_path) for _ in range(2))
    assert calls == [60]
    assert [len(text) for text in first.texts("train")][1] == 0
    assert np.array_equal(first.flat("train"), np.concatenate(second.texts("train")))
    assert first.tokenizer.token_to_id(MASK) is not None
    tokenized(texts | {"train": ["something else"]}, 60, train, tmp_path)
    assert len(calls) == 2
    assert not list(tmp_path.glob(".making-*"))


def test_the_program_s_corpus_is_split_by_the_ends_of_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bert.task, "DATA", tmp_path)
    made = bert.task.make_task(ROOT / "docs", CONFIG)
    assert made.training_size > 10 * made.validation_size > 0
