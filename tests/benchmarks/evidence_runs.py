"""Runs made by hand, of a study made by hand."""

from __future__ import annotations

import math

from benchmarks.evidence.jobs import Result
from benchmarks.evidence.protocol import Contender, Job, Study, Tuning
from benchmarks.evidence.search import Axis
from metric import Metric

LOSS, ACCURACY = Metric("val_loss", "loss", "lower"), Metric("val_accuracy", "accuracy", "higher")
AXES = (Axis("lr", (1.0, 2.0, 4.0, 8.0)),)
FIRST = Contender("Muon", "TorchMuon", {"lr": 2.0}, AXES)
SECOND = Contender("Shampoo", "Shampoo", {"lr": 2.0}, AXES)
STUDY = Study(
    name="made",
    title="A study made by hand",
    program="pretrain_gpt.py",
    arguments=(),
    config="gpt_muon.json",
    corpus="gutenberg",
    steps=100,
    small_steps=20,
    contenders=(FIRST, SECOND),
    tuning=Tuning("python_docs", steps=50, budget=4),
    horizons=(0.5, 0.8, 1.5),
    evaluations=10,
)


def job(contender: Contender, seed: int = 0, *, horizon: float = 1.0, study: Study = STUDY) -> Job:
    return Job(study, contender, contender.settings, seed, horizon, round(100 * horizon), 10)


def sloping(contender: Contender, slope: float, seed: int = 0, *, metric: Metric = LOSS) -> Result:
    """A run whose metric improves by `slope` a step and that takes a second a step, three for the second contender."""
    sign = -1 if metric.better == "lower" else 1
    records = [{"step": step, "loss": 1.0, "seconds": pace(contender) * step} for step in range(1, 101)]
    for record in records[9::10]:
        record[metric.key] = 10 + sign * slope * record["step"]
    return Result(job(contender, seed), metric, records)


def ended(
    contender: Contender,
    final: float,
    seed: int = 0,
    *,
    horizon: float = 1.0,
    metric: Metric = LOSS,
    study: Study = STUDY,
) -> Result:
    """A run of which the end alone is known; nan for one that diverged at step 3."""
    made = job(contender, seed, horizon=horizon, study=study)
    if math.isnan(final):
        return Result(made, metric, [{"step": 2, "seconds": 2.0}], "abc", 3)
    end = {"step": made.schedule, "seconds": pace(contender) * made.schedule, metric.key: final}
    return Result(made, metric, [end], "abc")


def pace(contender: Contender) -> float:
    return 1.0 if contender.name == FIRST.name else 3.0
