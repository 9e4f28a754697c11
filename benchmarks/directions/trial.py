"""One trial: its settings, its training, and what came of it."""

from __future__ import annotations

import subprocess
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.directions.formulas import cosine
from benchmarks.directions.prototype import Packaged, Prototype
from gpt.build import build_gpt
from gpt.data import Corpus, cut_windows, load_corpus
from gpt.model import GPTConfig
from sampling import draw

DATA = Path(__file__).resolve().parents[2] / "data"
VALIDATION_WINDOWS = 256
# Decays of the averages of the weights that are validated besides, at the end.
AVERAGES = (0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Trial:
    """Everything that decides a trial's losses. Rates of embedding, head and vectors are multiples of `lr`."""

    text: str = "python_docs"
    layers: int = 2
    d_model: int = 256
    heads: int = 4
    context: int = 256
    mlp: str = "gated"
    tokens: int = 16384
    micro: int = 4
    steps: int = 120
    warmup: int = 20
    lr_floor: float = 0.1
    seed: int = 100
    # What moves the matrices.
    direction: str = "muon"
    lr: float = 1e-2
    # Of a step's elements; of the package's direction -1 takes the grafting step's.
    rms: float = 0.2
    momentum: float = 0.95
    momentum_warmup: int = 0
    weight_decay: float = 0.1
    # AdamW's, for the rest.
    embedding: float = 4.0
    head: float = 0.4
    vector: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    nesterov_rest: bool = False
    # Of whitened directions.
    block: int = 256
    statistics: str = "mean"
    statistics_beta: float = 0.95
    sampled: int = 8
    exponent: float = 1 / 3
    exponent_right: float = -1.0
    ridge: float = 1e-6
    interval: int = 10
    delay: int = 5
    early: bool = True
    # What is made of the newest statistics in each step in the eigenbases at hand: "", "values" or "first_order".
    live: str = ""
    method: str = "cubic"
    count: int = 3
    floor: float = 0.05
    rows: bool = False
    # The package's `matmul_precision`.
    precision: str = "highest"
    # Norm control: matrices keep the norms they began with.
    hyperball: bool = False

    @classmethod
    def of(cls, settings: dict[str, str]) -> Trial:
        """From words of a command line.

        Raises:
            ValueError: for a key that there isn't, and for a value that is not of its kind.
        """
        kinds = {field.name: type(getattr(cls, field.name)) for field in fields(cls)}
        unknown = settings.keys() - kinds.keys()
        if unknown:
            raise ValueError(f"{', '.join(sorted(unknown))}: the keys are {', '.join(kinds)}")
        return cls(
            **{key: value == "True" if kinds[key] is bool else kinds[key](value) for key, value in settings.items()}
        )

    def differs(self) -> dict[str, Any]:
        """What is not as it is by default."""
        plain = Trial()
        return {key: value for key, value in asdict(self).items() if value != getattr(plain, key)}


def carry_out(trial: Trial, stop: int | None = None) -> dict[str, Any]:
    """Trains, and gives what a row of the table holds: settings, commit, losses by step, seconds."""
    corpus = load_corpus(DATA / trial.text, trial.context)
    torch.manual_seed(trial.seed)
    model = build_gpt(
        GPTConfig(trial.layers, trial.d_model, trial.heads, trial.context, architecture="modern", mlp=trial.mlp)
    )
    optimizer = (Packaged if trial.direction.startswith("ds:") else Prototype)(model, trial)
    curve, training, began = {}, [], time.perf_counter()
    spent = 0.0
    averages = {decay: [p.detach().clone() for p in model.parameters()] for decay in AVERAGES}
    for step in range(trial.steps):
        start = time.thread_time()
        loss = train(model, optimizer, corpus, trial, step)
        optimizer.step(step, cosine(step, trial.steps, trial.warmup, trial.lr_floor))
        for decay, average in averages.items():
            torch._foreach_lerp_(average, [p.detach() for p in model.parameters()], 1 - decay)
        spent += time.thread_time() - start
        training.append(round(loss, 4))
        if (step + 1) % max(1, trial.steps // 6) == 0 or step + 1 in (stop, trial.steps):
            curve[step + 1] = round(validate(model, corpus, trial), 5)
        if stop is not None and step + 1 >= stop:
            break
    averaged = {}
    for decay, average in averages.items():
        torch._foreach_copy_([p.detach() for p in model.parameters()], average)
        averaged[decay] = round(validate(model, corpus, trial), 5)
    return {
        "averaged": averaged,
        "settings": asdict(trial),
        "commit": commit(),
        "loss": curve[max(curve)],
        "curve": curve,
        "training": training[:: max(1, trial.steps // 30)],
        "cpu_seconds": round(spent, 1),
        "optimizer_seconds": round(optimizer.seconds, 1),
        "seconds": round(time.perf_counter() - began, 1),
    }


def train(model: nn.Module, optimizer: Packaged | Prototype, corpus: Corpus, trial: Trial, step: int) -> float:
    """Forward and backward of one step's micro-batches; gradients are left to the optimizer."""
    total, windows = 0.0, trial.tokens // trial.context // trial.micro
    for part in range(trial.micro):
        samples = draw(
            corpus.train.size - trial.context,
            seed=trial.seed,
            step=step,
            part=part,
            parts=trial.micro,
            samples=windows,
        )
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(*cut_windows(corpus.train, samples.places, trial.context))
        (loss / trial.micro).backward()
        optimizer.take_micro_batch()
        total += float(loss.detach())
    return total / trial.micro


@torch.no_grad()
def validate(model: nn.Module, corpus: Corpus, trial: Trial) -> float:
    """Nats per byte on the same windows for every trial of a text."""
    places = np.linspace(0, corpus.validation.size - trial.context - 1, VALIDATION_WINDOWS).astype(np.int64)
    losses: list[Tensor] = []
    for at in range(0, len(places), 16):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(model(*cut_windows(corpus.validation, places[at : at + 16], trial.context)))
    return float(torch.stack(losses).double().mean())


def commit() -> str:
    """The commit that is checked out, with a plus where files differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
