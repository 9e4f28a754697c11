"""Trains a residual network on small images with the optimizer that a DeepSpeed JSON names.

    deepspeed --num_gpus 2 launch/train_resnet.py --deepspeed_config configs/resnet_shampoo.json

Everything a run leaves behind lies in `runs/<name>/`; a second call with the same name resumes it.
"""

from __future__ import annotations

import argparse

import command_line
import job
from corpora import CORPORA
from resnet.data import ImagesError, load_images
from resnet.model import ResNetConfig
from resnet.task import ResNetTask, add_arguments


def main() -> None:
    parser = command_line.build_parser(
        __doc__.splitlines()[0],
        steps=300,
        eval_interval=10,
        data="folder of images in MNIST's layout (default: data/fashion_mnist)",
    )
    add_arguments(parser)
    arguments = command_line.parse(parser)
    if arguments.width % 8:
        parser.error(f"--width {arguments.width}: must be divisible by 8, the channels of a normalisation group")
    job.main(arguments, make_task)


def make_task(arguments: argparse.Namespace) -> ResNetTask:
    try:
        train, test = load_images(job.data_folder(arguments, CORPORA["fashion_mnist"]))
    except ImagesError as error:
        raise job.DataError(str(error)) from None
    return ResNetTask(train, test, ResNetConfig(arguments.blocks, arguments.width))


if __name__ == "__main__":
    main()
