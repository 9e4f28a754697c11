"""Turns text into Megatron's indexed datasets: trains a tokenizer on it and writes <prefix>.bin, .idx, .json.

python launch/prepare_data.py --input data/gutenberg --output-prefix data/gutenberg_gpt --vocab-size 2048
python launch/prepare_data.py --model bert --input data/gutenberg --output-prefix data/gutenberg_bert
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder, get_bin_path, get_idx_path
from tqdm import tqdm

from gpt.data import CorpusError, default_corpus, find_texts
from tokenization import END, describe, train_bpe, train_wordpiece

# A book is cut into documents of about this many characters, so that a split has some of every book.
DOCUMENT = 10_000


def main() -> None:
    arguments = parse_arguments()
    try:
        files = find_texts(arguments.input) if arguments.input else default_corpus()[1]
    except CorpusError as error:
        sys.exit(f"prepare_data: error: {error}")
    documents = [document for file in files for document in documents_of(file.read_text(errors="replace"))]
    train = train_bpe if arguments.model == "gpt" else train_wordpiece
    tokenizer = train(documents, arguments.vocab_size)
    prefix = str(arguments.output_prefix)
    arguments.output_prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(get_bin_path(prefix), dtype=DType.optimal_dtype(tokenizer.get_vocab_size()))
    tokens = 0
    for document in tqdm(documents, unit="document"):
        parts = [document] if arguments.model == "gpt" else list(sentences(document))
        encoded = [e.ids for e in tokenizer.encode_batch(parts)]
        if arguments.model == "gpt":
            encoded[0].append(tokenizer.token_to_id(END))
        kept = [ids for ids in encoded if ids]
        if kept:
            builder.add_document(torch.from_numpy(np.concatenate(kept)), [len(ids) for ids in kept])
            tokens += sum(map(len, kept))
    builder.finalize(get_idx_path(prefix))
    tokenizer.save(f"{prefix}.json")
    print(f"{prefix}: {len(documents):,} documents, {tokens:,} tokens, {describe(tokenizer)}")


def documents_of(text: str) -> Iterator[str]:
    """Pieces of about `DOCUMENT` characters, cut at blank lines."""
    paragraphs: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        paragraphs.append(paragraph)
        if sum(map(len, paragraphs)) >= DOCUMENT:
            yield "\n\n".join(paragraphs)
            paragraphs = []
    if any(paragraph.strip() for paragraph in paragraphs):
        yield "\n\n".join(paragraphs)


def sentences(document: str) -> Iterator[str]:
    """What ends in a full stop, a question or exclamation mark; BERT's pairs are made of them."""
    for sentence in re.split(r"(?<=[.!?])[\"')\]]*\s+", document):
        if sentence.strip():
            yield " ".join(sentence.split())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=Path, help="text file or folder of text (default: Gutenberg's books)")
    parser.add_argument("--output-prefix", type=Path, required=True, help="path of the dataset without its suffixes")
    parser.add_argument("--model", choices=("gpt", "bert"), default="gpt", help="whose tokens (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=2048, help="tokens to train (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.vocab_size < 300:
        parser.error(f"--vocab-size {arguments.vocab_size}: must be at least 300, for every byte and special token")
    return arguments


if __name__ == "__main__":
    main()
