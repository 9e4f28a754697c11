"""Pretrains a BERT by masked tokens with the optimizer that a DeepSpeed JSON names.

    deepspeed --num_gpus 2 launch/pretrain_bert.py --deepspeed_config configs/bert_shampoo.json

Everything a run leaves behind lies in `runs/<name>/`; a second call with the same name resumes it.
"""

from __future__ import annotations

import argparse

import bert.task
import command_line
import job
from bert.model import BertConfig
from corpora import CORPORA
from gpt.data import CorpusError


def main() -> None:
    parser = command_line.build_parser(
        __doc__.splitlines()[0],
        steps=400,
        eval_interval=20,
        data="text file or folder of text (default: Python's documentation)",
    )
    bert.task.add_arguments(parser)
    arguments = command_line.parse(parser)
    if arguments.d_model % arguments.heads:
        parser.error(f"--d-model {arguments.d_model} must be divisible by --heads {arguments.heads}")
    job.main(arguments, make_task)


def make_task(arguments: argparse.Namespace) -> bert.task.BertTask:
    size = {name: getattr(arguments, name) for name in BertConfig.__dataclass_fields__}
    try:
        return bert.task.make_task(job.data_folder(arguments, CORPORA["python_docs"]), BertConfig(**size))
    except CorpusError as error:
        raise job.DataError(str(error)) from None


if __name__ == "__main__":
    main()
