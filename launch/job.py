"""The training loop of this folder's programs: any task, under the optimizer that a DeepSpeed JSON names.

Everything a run leaves behind lies in `runs/<name>/`; a second call with the same name resumes it.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from tqdm import tqdm

import ds_shampoo
from clock import Spent, StepClock
from command_line import effective_config
from corpora import Corpus
from ds_shampoo.roots.cores import local_place
from leftovers import loading_ops
from optimizers import OptimizerError, take_optimizer
from plots import plot_losses
from recorder import Record, Recorder, read_metrics
from run_folder import RunError, RunFolder
from sampling import dealt, draw
from task import Batch, Task


class DataError(ValueError):
    """Data that can't be read or is too small; the message names the path."""


class Trainer:
    """One rank's part in the training loop."""

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        optimizer: Any,
        task: Task,
        arguments: argparse.Namespace,
        folder: RunFolder,
    ) -> None:
        self.engine = engine
        # ZeRO wraps the optimizer of the JSON; only Shampoo reports metrics.
        self.optimizer = getattr(optimizer, "optimizer", optimizer)
        self.task = task
        self.arguments = arguments
        self.folder = folder
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.micro_batches: int = engine.gradient_accumulation_steps() * self.world_size

    def run(self) -> None:
        """Trains from the engine's step on to the last one asked for."""
        arguments, first = self.arguments, self.engine.global_steps
        last = min(arguments.steps, arguments.stop_at or arguments.steps)
        recorder = Recorder(self.folder.path, first) if self.rank == 0 else None
        clock = StepClock()
        with tqdm(total=arguments.steps, initial=first, disable=self.rank != 0, unit="step", smoothing=0.1) as bar:
            for step in range(first + 1, last + 1):
                record, spent = self._step(step, clock)
                if step % arguments.eval_interval == 0 or step == arguments.steps:
                    record |= self._evaluate()
                if step == arguments.steps and self.rank == 0:
                    record |= self._final()
                if recorder:
                    recorder.write(record, spent)
                bar.set_postfix_str(self._progress(record), refresh=False)
                bar.update()
                if arguments.save_interval and (step % arguments.save_interval == 0 or step == last):
                    self._save()

    def _step(self, step: int, clock: StepClock) -> tuple[Record, Spent]:
        """One optimizer step; returns its record and what it took."""
        clock.start()
        learning_rate = self.engine.get_lr()[0]
        loss = self._train(step - 1)
        if not math.isfinite(loss):
            sys.exit(f"error: the loss is {loss} at step {step}")
        spent = clock.spent()
        units = self.engine.train_batch_size() * self.task.units_per_sample
        grad_norm = self.engine.get_global_grad_norm()
        record = {
            "step": step,
            **self.task.training_record(loss),
            "lr": learning_rate,
            self.task.unit: step * units,
            f"{self.task.unit}_per_s": round(units / spent.wall, 1),
            "grad_norm": None if grad_norm is None else float(grad_norm),
        }
        return record | self._optimizer_metrics(), spent

    def _train(self, step: int) -> float:
        """Forward, backward and update of one step; returns its mean loss over micro-batches and ranks."""
        engine = self.engine
        total = torch.zeros((), device=engine.device)
        for micro_step in range(engine.gradient_accumulation_steps()):
            samples = draw(
                self.task.training_size,
                seed=self.arguments.seed,
                step=step,
                part=micro_step * self.world_size + self.rank,
                parts=self.micro_batches,
                samples=engine.train_micro_batch_size_per_gpu(),
            )
            loss = engine(*self._on_device(self.task.training_batch(samples)))
            engine.backward(loss)
            engine.step()
            total += loss.detach()
        dist.all_reduce(total)
        return float(total) / self.micro_batches

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """The metrics over the validation set, all ranks together."""
        engine, total = self.engine, None
        engine.eval()
        for number, counts in dealt(self.task.validation_size, self.rank, self.world_size):
            sums = self.task.measure(engine, self._on_device(self.task.validation_batch(number))).double()
            sums = sums if counts else torch.zeros_like(sums)
            total = sums if total is None else total + sums
        engine.train()
        assert total is not None
        dist.all_reduce(total)
        found = self.task.summary(total.cpu())
        metric = self.task.metric
        engine.monitor.write_events([(f"Validation/Samples/{metric.name}", found[metric.key], engine.global_samples)])
        return found

    @torch.no_grad()
    def _final(self) -> dict[str, float]:
        module = self.engine.module
        module.eval()
        found = dict(self.task.final(module))
        module.train()
        return found

    def _on_device(self, batch: Batch) -> Batch:
        return tuple(tensor.to(self.engine.device) for tensor in batch)

    def _optimizer_metrics(self) -> Record:
        metrics = getattr(self.optimizer, "metrics", None)
        return metrics() if metrics else {}

    def _progress(self, record: Record) -> str:
        unit = self.task.unit
        age = f", roots {record['root_age_mean']:.1f} steps old" if "root_age_mean" in record else ""
        return f"loss {record['loss']:.3f}, lr {record['lr']:.2e}, {record[f'{unit}_per_s']:,.0f} {unit}/s{age}"

    def _save(self) -> None:
        self.folder.save(self.engine)
        if self.rank == 0:
            records = {self.folder.path.name: read_metrics(self.folder.path)}
            plot_losses(records, self.folder.path / "loss.png")


def main(arguments: argparse.Namespace, make_task: Callable[[argparse.Namespace], Task]) -> None:
    """Trains until `--steps`, from the run's newest checkpoint on.

    Args:
        make_task: reads the data and says what to do with it; may raise DataError.
    """
    try:
        config = effective_config(arguments)
        task = make_task(arguments)
        use_cores()
        with loading_ops():
            deepspeed.init_distributed()
            dist.barrier()  # from here on every rank has mapped the others' buffers, and any may end
            folder = open_folder(arguments, config, task)
            if folder.saved_step() >= arguments.steps:
                report_finished(folder, arguments)
                return
            engine, optimizer = build(arguments, config, task)
    except (DataError, OptimizerError, RunError, ds_shampoo.SettingsError) as error:
        sys.exit(f"{Path(sys.argv[0]).stem}: error: {error}")
    if folder.saved_step():
        folder.load(engine)
    say(f"data: {task.describe()}")
    say(f"training {folder.path} from step {engine.global_steps} to {arguments.steps}")
    Trainer(engine, optimizer, task, arguments, folder).run()
    report_end(folder, arguments, task)


def data_folder(arguments: argparse.Namespace, corpus: Corpus) -> Path:
    """What `--data` names, or else where the corpus was put.

    Raises:
        DataError: where that is not there.
    """
    path = arguments.data or corpus.folder
    if not path.exists():
        how = "" if arguments.data else f"; fetch it by `python launch/fetch_data.py {corpus.name}`"
        raise DataError(f"{path}: no such file or folder{how}")
    return path


def use_cores() -> None:
    """Shares this machine's cores among its ranks, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        _, ranks = local_place()
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))


def open_folder(arguments: argparse.Namespace, config: dict[str, Any], task: Task) -> RunFolder:
    """The run's folder, ready to be written to; RunError where it holds another run."""
    folder = RunFolder(arguments.runs / arguments.name)
    effective = {
        "steps": arguments.steps,
        "seed": arguments.seed,
        "world_size": dist.get_world_size(),
        "autocast": arguments.autocast,
        "metric": task.metric._asdict(),
        **task.settings(),
        "deepspeed": config,
    }
    if folder.saved_step():
        folder.check_resumable(effective)
    dist.barrier()
    if dist.get_rank() == 0 and folder.saved_step() < arguments.steps:
        folder.prepare(effective)
    dist.barrier()
    return folder


def build(arguments: argparse.Namespace, config: dict[str, Any], task: Task) -> tuple[deepspeed.DeepSpeedEngine, Any]:
    """The engine around a new model, and the optimizer that the JSON names."""
    torch.manual_seed(arguments.seed)
    model, config = task.model(), deepcopy(config)
    if arguments.autocast:
        # Within the module: DeepSpeed's engine switches off an autocast that surrounds it.
        device = get_accelerator().device_name()
        model.forward = torch.autocast(device, torch.bfloat16)(model.forward)  # type: ignore[method-assign]
    own = take_optimizer(config, model)
    engine, optimizer, _, _ = ds_shampoo.initialize(
        model=model, model_parameters=model.parameters(), optimizer=own, config=config
    )
    return engine, optimizer


def report_finished(folder: RunFolder, arguments: argparse.Namespace) -> None:
    """Says that there is nothing left to do, and how to do more."""
    say(
        f"{folder.path} is finished: {folder.saved_step()} steps done, {arguments.steps} asked for. "
        "Raise --steps to train on, or give another --name for a new run."
    )


def report_end(folder: RunFolder, arguments: argparse.Namespace, task: Task) -> None:
    """Prints what the run came to, in one line."""
    if dist.get_rank() != 0:
        return
    last = read_metrics(folder.path)[-1]
    spent = f"after {last['step']} steps, {last[task.unit]:,} {task.unit}, {last['seconds']:.0f} s of training"
    if last["step"] < arguments.steps:
        print(f"stopped {spent}; the same command without --stop-at goes on to step {arguments.steps}")
    else:
        print(f"validation {task.metric.name} {last[task.metric.key]:.4f} {spent}; see {folder.path}")


def say(message: str) -> None:
    """Prints on rank 0."""
    if dist.get_rank() == 0:
        print(message, flush=True)
