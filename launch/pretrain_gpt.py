"""Pretrains a GPT with the optimizer that a DeepSpeed JSON names, under the `deepspeed` launcher.

    deepspeed --num_gpus 2 launch/pretrain_gpt.py --deepspeed_config configs/gpt_zero2_polar.json

Everything a run leaves behind lies in `runs/<name>/`; a second call with the same name resumes it.
"""

from __future__ import annotations

import argparse

import command_line
import job
from gpt.data import CorpusError, load_corpus
from gpt.task import GPTTask, add_arguments, config_of
from gpt.tokens import BYTES, as_bpe, as_bytes


def main() -> None:
    parser = command_line.build_parser(
        __doc__.splitlines()[0],
        steps=400,
        eval_interval=50,
        data="text file or folder of text (default: Gutenberg's books)",
    )
    add_arguments(parser)
    arguments = command_line.parse(parser)
    try:
        config_of(arguments)
    except ValueError as error:
        parser.error(str(error))
    job.main(arguments, make_task)


def make_task(arguments: argparse.Namespace) -> GPTTask:
    config = config_of(arguments)
    try:
        corpus = load_corpus(arguments.data, config.context)
        tokens = (
            as_bytes(corpus) if arguments.vocabulary == BYTES else as_bpe(corpus, arguments.vocabulary, config.context)
        )
    except CorpusError as error:
        raise job.DataError(str(error)) from None
    return GPTTask(tokens, config, arguments.eval_windows)


if __name__ == "__main__":
    main()
