"""Trains a translator from English to German with the optimizer that a DeepSpeed JSON names.

    deepspeed --num_gpus 2 launch/train_translation.py --deepspeed_config configs/translation_shampoo.json

Everything a run leaves behind lies in `runs/<name>/`; a second call with the same name resumes it.
"""

from __future__ import annotations

import argparse

import command_line
import job
from corpora import CORPORA, DATA
from translation.data import PairsError, load_translations
from translation.model import TranslatorConfig
from translation.task import TranslationTask, add_arguments

SIZE = ("layers", "d_model", "heads", "longest", "vocab")


def main() -> None:
    parser = command_line.build_parser(
        __doc__.splitlines()[0],
        steps=400,
        eval_interval=20,
        data="folder of en.txt and de.txt, line by line the same (default: data/help_en_de)",
    )
    add_arguments(parser)
    arguments = command_line.parse(parser)
    if arguments.d_model % arguments.heads:
        parser.error(f"--d-model {arguments.d_model} must be divisible by --heads {arguments.heads}")
    job.main(arguments, make_task)


def make_task(arguments: argparse.Namespace) -> TranslationTask:
    config = TranslatorConfig(**{name: getattr(arguments, name) for name in SIZE})
    folder = job.data_folder(arguments, CORPORA["help_en_de"])
    try:
        data = load_translations(folder, config.vocab, config.longest, DATA / ".tokenized")
    except PairsError as error:
        raise job.DataError(str(error)) from None
    return TranslationTask(data, config, autocast=arguments.autocast)


if __name__ == "__main__":
    main()
