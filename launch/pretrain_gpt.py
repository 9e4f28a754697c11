"""Pretrains a byte-level GPT with the optimizer that a DeepSpeed JSON names, under the `deepspeed` launcher.

    deepspeed --num_gpus 2 launch/pretrain_gpt.py --deepspeed_config configs/gpt_zero2_shampoo.json

Everything a run leaves behind lies in `runs/<name>/`; a second call with the same name resumes it.
"""

from __future__ import annotations

import argparse

import command_line
import job
from gpt.data import CorpusError, load_corpus
from gpt.model import GPTConfig
from gpt.task import GPTTask, add_arguments


def main() -> None:
    parser = command_line.build_parser(
        __doc__.splitlines()[0],
        steps=400,
        eval_interval=50,
        data="text file or folder of text (default: Gutenberg's books)",
    )
    add_arguments(parser)
    arguments = command_line.parse(parser)
    if arguments.d_model % arguments.heads:
        parser.error(f"--d-model {arguments.d_model} must be divisible by --heads {arguments.heads}")
    job.main(arguments, make_task)


def make_task(arguments: argparse.Namespace) -> GPTTask:
    config = GPTConfig(arguments.layers, arguments.d_model, arguments.heads, arguments.context)
    try:
        corpus = load_corpus(arguments.data, config.context)
    except CorpusError as error:
        raise job.DataError(str(error)) from None
    return GPTTask(corpus, config, arguments.eval_windows)


if __name__ == "__main__":
    main()
