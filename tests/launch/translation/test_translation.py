"""The translation task: an honest split, padding that changes nothing, a decoder that doesn't look ahead."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from translation.data import IGNORED, PAD, START, STOP, Pairs, PairsError, batch_of, load_translations, padded
from translation.model import Translator, TranslatorConfig
from translation.task import TranslationTask

ROOT = Path(__file__).resolve().parents[3]
CONFIG = TranslatorConfig(layers=1, d_model=32, heads=2, longest=12, vocab=300)


def write_pairs(folder: Path) -> Path:
    """Sentences of the documentation, and the same with their words in reverse."""
    folder.mkdir(parents=True, exist_ok=True)
    text = (ROOT / "docs" / "algorithm.md").read_text()
    lines = [line for line in (" ".join(part.split()) for part in text.split(".")) if line]
    (folder / "en.txt").write_text("\n".join(lines * 2))
    (folder / "de.txt").write_text("\n".join(" ".join(reversed(line.split())) for line in lines * 2))
    return folder


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> TranslationTask:
    folder = write_pairs(tmp_path_factory.mktemp("pairs"))
    data = load_translations(folder, CONFIG.vocab, CONFIG.longest, folder / "cache")
    return TranslationTask(data, CONFIG, autocast=False)


def test_no_text_is_on_both_sides_of_the_split(task: TranslationTask) -> None:
    train = {tuple(text.tolist()) for text in task._data.train.sources}
    assert not train & {tuple(text.tolist()) for text in task._data.validation.sources}
    assert len(task._data.validation) == len(task._data.references) > 0
    assert max(len(text) for text in task._data.train.sources) <= CONFIG.longest


def test_the_decoder_is_given_what_it_has_to_say_one_token_late() -> None:
    pairs = Pairs([np.array([5, 6]), np.array([7])], [np.array([8, 9, 10]), np.array([], np.int64)])
    source, given, said = batch_of(pairs, [0, 1])
    assert source.tolist() == [[5, 6], [7, PAD]]
    assert given.tolist() == [[START, 8, 9, 10], [START, PAD, PAD, PAD]]
    assert said.tolist() == [[8, 9, 10, STOP], [STOP, IGNORED, IGNORED, IGNORED]]


def test_padding_changes_no_logits() -> None:
    torch.manual_seed(0)
    model = Translator(CONFIG).eval()
    source, given = torch.randint(1, 300, (1, 5)), torch.randint(1, 300, (1, 4))
    alone = model.decode(*model.encode(source), given)
    longer = torch.cat([source, torch.full((1, 4), PAD)], dim=1)
    assert torch.allclose(model.decode(*model.encode(longer), given), alone, atol=1e-6)
    assert model.encode(padded([np.array([], np.int64)]))[0].isfinite().all()


def test_the_decoder_does_not_look_ahead() -> None:
    torch.manual_seed(0)
    model = Translator(CONFIG).eval()
    source, given = torch.randint(1, 300, (2, 5)), torch.randint(1, 300, (2, 6))
    changed = given.clone()
    changed[:, 3:] = 1
    memory = model.encode(source)
    assert torch.allclose(model.decode(*memory, given)[:, :3], model.decode(*memory, changed)[:, :3], atol=1e-6)


def test_a_translation_is_the_likeliest_continuation_until_it_stops() -> None:
    torch.manual_seed(0)
    model = Translator(CONFIG).eval()
    source = torch.randint(1, 300, (3, 5))
    said = model.translate(source)
    assert said.shape[1] <= CONFIG.longest
    logits = model.decode(*model.encode(source), torch.cat([torch.full((3, 1), START), said[:, :-1]], dim=1))
    for row, best in zip(said.tolist(), logits.argmax(dim=2).tolist(), strict=True):
        length = row.index(PAD) if PAD in row else len(row)
        assert row[:length] == best[:length]
        assert set(row[length:]) <= {PAD}


def test_labels_are_smoothed_in_training_only(task: TranslationTask) -> None:
    torch.manual_seed(0)
    model, batch = task.model(), task.validation_batch(0)
    training = model(*batch).item()
    model.eval()
    assert model(*batch).item() != pytest.approx(training, abs=1e-7)
    assert task.summary(task.measure(model, batch))["val_loss"] == pytest.approx(model(*batch).item(), rel=1e-6)


def test_bleu_is_told_of_the_validation_s_own_references(task: TranslationTask) -> None:
    torch.manual_seed(0)
    assert 0 <= task.final(task.model().eval())["final_BLEU"] < 20


@pytest.mark.parametrize(
    ("english", "german", "message"),
    [("a\nb\n", "a\n", "2 lines of English but 1 of German"), ("a\n", None, "de.txt"), ("a\n", "b\n", "too few")],
)
def test_texts_that_do_not_belong_together_are_refused(
    tmp_path: Path, english: str, german: str | None, message: str
) -> None:
    (tmp_path / "en.txt").write_text(english)
    if german is not None:
        (tmp_path / "de.txt").write_text(german)
    with pytest.raises(PairsError, match=message):
        load_translations(tmp_path, 300, 12, tmp_path / "cache")
