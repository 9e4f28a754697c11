"""Pretrains a byte-level GPT with the optimizer that a DeepSpeed JSON names, under the `deepspeed` launcher.

    deepspeed --num_gpus 2 launch/pretrain_gpt.py --deepspeed_config configs/gpt_zero2_shampoo.json

Everything a run leaves behind lies in `runs/<name>/`; a second call with the same name resumes it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from tqdm import tqdm

import ds_shampoo
from data import Corpus, CorpusError, load_corpus, training_batch, validation_batches
from model import GPT, GPTConfig
from plots import plot_losses
from recorder import Record, Recorder, read_metrics
from run_folder import RunError, RunFolder

# DeepSpeed's schedules that have to know how long the run is.
SCHEDULES_WITH_LENGTH = ("WarmupCosineLR", "WarmupDecayLR")

# Windows in one forward pass of an evaluation.
EVAL_BATCH = 8


class Trainer:
    """One rank's part in the training loop."""

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        optimizer: Any,
        corpus: Corpus,
        arguments: argparse.Namespace,
        folder: RunFolder,
    ) -> None:
        self.engine = engine
        # ZeRO wraps the optimizer of the JSON; only Shampoo reports metrics.
        self.optimizer = getattr(optimizer, "optimizer", optimizer)
        self.corpus = corpus
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
        with tqdm(total=arguments.steps, initial=first, disable=self.rank != 0, unit="step", smoothing=0.1) as bar:
            for step in range(first + 1, last + 1):
                record, duration = self._step(step)
                if step % arguments.eval_interval == 0 or step == arguments.steps:
                    record["val_loss"] = self._evaluate()
                if recorder:
                    recorder.write(record, duration)
                bar.set_postfix_str(_progress(record), refresh=False)
                bar.update()
                if step % arguments.save_interval == 0 or step == last:
                    self._save()

    def _step(self, step: int) -> tuple[Record, float]:
        """One optimizer step; returns its record and its duration in seconds."""
        start = time.perf_counter()
        learning_rate = self.engine.get_lr()[0]
        loss = self._train(step - 1)
        if not math.isfinite(loss):
            sys.exit(f"pretrain_gpt: error: the loss is {loss} at step {step}")
        duration = time.perf_counter() - start
        tokens = self.engine.train_batch_size() * self.arguments.context
        grad_norm = self.engine.get_global_grad_norm()
        record = {
            "step": step,
            "loss": loss,
            "lr": learning_rate,
            "tokens": step * tokens,
            "tokens_per_s": round(tokens / duration, 1),
            "grad_norm": None if grad_norm is None else float(grad_norm),
        }
        return record | self._optimizer_metrics(), duration

    def _train(self, step: int) -> float:
        """Forward, backward and update of one step; returns its mean loss over micro-batches and ranks."""
        engine = self.engine
        total = torch.zeros((), device=engine.device)
        for micro_step in range(engine.gradient_accumulation_steps()):
            tokens, targets = training_batch(
                self.corpus,
                self.arguments.context,
                seed=self.arguments.seed,
                step=step,
                part=micro_step * self.world_size + self.rank,
                parts=self.micro_batches,
                windows=engine.train_micro_batch_size_per_gpu(),
            )
            loss = engine(tokens.to(engine.device), targets.to(engine.device))
            engine.backward(loss)
            engine.step()
            total += loss.detach()
        dist.all_reduce(total)
        return float(total) / self.micro_batches

    @torch.no_grad()
    def _evaluate(self) -> float:
        """The mean loss over the validation windows, all ranks together."""
        engine = self.engine
        engine.eval()
        total = torch.zeros(2, device=engine.device)
        for tokens, targets, weight in validation_batches(
            self.corpus,
            self.arguments.context,
            windows=self.arguments.eval_windows,
            batch=EVAL_BATCH,
            rank=self.rank,
            world_size=self.world_size,
        ):
            loss = engine(tokens.to(engine.device), targets.to(engine.device))
            total += torch.stack((loss * weight, torch.full_like(loss, weight)))
        engine.train()
        dist.all_reduce(total)
        loss = (total[0] / total[1]).item()
        engine.monitor.write_events([("Validation/Samples/loss", loss, engine.global_samples)])
        return loss

    def _optimizer_metrics(self) -> Record:
        metrics = getattr(self.optimizer, "metrics", None)
        return metrics() if metrics else {}

    def _save(self) -> None:
        self.folder.save(self.engine)
        if self.rank == 0:
            plot_losses({self.folder.path.name: read_metrics(self.folder.path)}, self.folder.path / "loss.png")


def main() -> None:
    arguments = parse_arguments()
    try:
        config = effective_config(arguments)
        corpus = load_corpus(arguments.data, arguments.context)
        use_cores()
        deepspeed.init_distributed()
        folder = open_folder(arguments, config, corpus)
        if folder.saved_step() >= arguments.steps:
            report_finished(folder, arguments)
            return
        engine, optimizer = build(arguments, config)
    except (CorpusError, RunError, ds_shampoo.SettingsError) as error:
        sys.exit(f"pretrain_gpt: error: {error}")
    if folder.saved_step():
        folder.load(engine)
    say(f"corpus: {corpus.describe()}")
    say(f"training {folder.path} from step {engine.global_steps} to {arguments.steps}")
    Trainer(engine, optimizer, corpus, arguments, folder).run()
    report_end(folder, arguments)


def parse_arguments() -> argparse.Namespace:
    """The command line, checked as far as it can be without reading anything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    positive, size = _integer_from(1), GPTConfig()
    parser.add_argument(
        "--deepspeed_config", type=Path, required=True, help="DeepSpeed's JSON, which names the optimizer"
    )
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    parser.add_argument("--name", help="name of the run (default: that of the JSON file)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="text file or folder of text (default: Gutenberg's books)")
    parser.add_argument("--steps", type=positive, default=400, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--stop-at", type=positive, help="stop at this step; a later call goes on to --steps")
    parser.add_argument(
        "--seed", type=_integer_from(0), default=0, help="of weights and batches (default: %(default)s)"
    )
    parser.add_argument(
        "--eval-interval", type=positive, default=50, help="steps between validations (default: %(default)s)"
    )
    parser.add_argument(
        "--eval-windows", type=positive, default=128, help="windows to validate on (default: %(default)s)"
    )
    parser.add_argument(
        "--save-interval", type=positive, default=100, help="steps between checkpoints (default: %(default)s)"
    )
    for name in ("layers", "d_model", "heads", "context"):
        flag, default = "--" + name.replace("_", "-"), getattr(size, name)
        parser.add_argument(flag, type=positive, default=default, help="size of the model (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.d_model % arguments.heads:
        parser.error(f"--d-model {arguments.d_model} must be divisible by --heads {arguments.heads}")
    if "RANK" not in os.environ:
        parser.error("start this program with the deepspeed launcher or torchrun")
    arguments.name = arguments.name or arguments.deepspeed_config.stem
    if not re.fullmatch(r"\w[\w.-]*", arguments.name):
        parser.error(f"--name {arguments.name}: letters, digits, '_', '-' and '.' only; it names a folder")
    return arguments


def effective_config(arguments: argparse.Namespace) -> dict[str, Any]:
    """DeepSpeed's JSON with what depends on this call filled in: the schedule's length, where events go.

    Raises:
        RunError: where the file can't be read as JSON.
    """
    try:
        config: dict[str, Any] = json.loads(arguments.deepspeed_config.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"--deepspeed_config {arguments.deepspeed_config}: {error}") from None
    scheduler = config.get("scheduler", {})
    if scheduler.get("type") in SCHEDULES_WITH_LENGTH:
        scheduler.setdefault("params", {})["total_num_steps"] = arguments.steps
    if "tensorboard" in config:
        folder = RunFolder(arguments.runs / arguments.name).tensorboard
        config["tensorboard"] |= {"output_path": str(folder.parent), "job_name": folder.name}
    return config


def use_cores() -> None:
    """Shares this machine's cores among its ranks, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))


def open_folder(arguments: argparse.Namespace, config: dict[str, Any], corpus: Corpus) -> RunFolder:
    """The run's folder, ready to be written to; RunError where it holds another run."""
    folder = RunFolder(arguments.runs / arguments.name)
    effective = {
        "steps": arguments.steps,
        "seed": arguments.seed,
        "world_size": dist.get_world_size(),
        "data": {"source": corpus.source, "training_bytes": corpus.train.size},
        "model": asdict(model_config(arguments)),
        "deepspeed": config,
    }
    if folder.saved_step():
        folder.check_resumable(effective)
    dist.barrier()
    if dist.get_rank() == 0 and folder.saved_step() < arguments.steps:
        folder.prepare(effective)
    dist.barrier()
    return folder


def model_config(arguments: argparse.Namespace) -> GPTConfig:
    return GPTConfig(arguments.layers, arguments.d_model, arguments.heads, arguments.context)


def build(arguments: argparse.Namespace, config: dict[str, Any]) -> tuple[deepspeed.DeepSpeedEngine, Any]:
    """The engine around a new model, and the optimizer that the JSON names."""
    torch.manual_seed(arguments.seed)
    model = GPT(model_config(arguments))
    engine, optimizer, _, _ = ds_shampoo.initialize(model=model, model_parameters=model.parameters(), config=config)
    return engine, optimizer


def report_finished(folder: RunFolder, arguments: argparse.Namespace) -> None:
    """Says that there is nothing left to do, and how to do more."""
    say(
        f"{folder.path} is finished: {folder.saved_step()} steps done, {arguments.steps} asked for. "
        "Raise --steps to train on, or give another --name for a new run."
    )


def report_end(folder: RunFolder, arguments: argparse.Namespace) -> None:
    """Prints what the run came to, in one line."""
    if dist.get_rank() != 0:
        return
    last = read_metrics(folder.path)[-1]
    spent = f"after {last['step']} steps, {last['tokens']:,} tokens, {last['seconds']:.0f} s of training"
    if last["step"] < arguments.steps:
        print(f"stopped {spent}; the same command without --stop-at goes on to step {arguments.steps}")
    else:
        print(f"validation loss {last['val_loss']:.4f} {spent}; see {folder.path}")


def say(message: str) -> None:
    """Prints on rank 0."""
    if dist.get_rank() == 0:
        print(message, flush=True)


def _progress(record: Record) -> str:
    age = f", roots {record['root_age_mean']:.1f} steps old" if "root_age_mean" in record else ""
    return f"loss {record['loss']:.3f}, lr {record['lr']:.2e}, {record['tokens_per_s']:,.0f} tokens/s{age}"


def _integer_from(least: int) -> Any:
    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value}: must be at least {least}")
        return value

    return integer


if __name__ == "__main__":
    main()
