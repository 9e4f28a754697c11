"""Trains a click-through model (DLRM) with the optimizer that a DeepSpeed JSON names.

    deepspeed --num_gpus 2 launch/train_dlrm.py --deepspeed_config configs/dlrm_shampoo.json

Everything a run leaves behind lies in `runs/<name>/`; a second call with the same name resumes it.
"""

from __future__ import annotations

import argparse

import command_line
import job
from corpora import CORPORA
from dlrm.data import FlightsError, load_flights
from dlrm.task import DLRMTask


def main() -> None:
    parser = command_line.build_parser(
        __doc__.splitlines()[0],
        steps=400,
        eval_interval=20,
        data="flights.csv, or the folder that has it (default: data/flights)",
    )
    job.main(command_line.parse(parser), make_task)


def make_task(arguments: argparse.Namespace) -> DLRMTask:
    try:
        return DLRMTask(load_flights(job.data_folder(arguments, CORPORA["flights"])))
    except FlightsError as error:
        raise job.DataError(str(error)) from None


if __name__ == "__main__":
    main()
