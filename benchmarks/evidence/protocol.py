"""What is run: studies, their contenders, and the jobs that a protocol makes of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

# A validation costs as much as many steps; a small run's curve needs a few of them.
_SMALL_EVALUATIONS = 8


@dataclass(frozen=True, slots=True)
class Contender:
    """One optimizer in a study.

    Attributes:
        name: as tables have it.
        config: its DeepSpeed JSON, a file of configs/.
        lrs: the grid of peak learning rates to begin with, ascending by one factor.
        horizon: the length of its runs and of their schedules, in parts of the study's steps.
        overrides: optimizer settings in place of the JSON's, as (key, value) pairs.
    """

    name: str
    config: str
    lrs: tuple[float, ...]
    horizon: float = 1.0
    overrides: tuple[tuple[str, object], ...] = ()


@dataclass(frozen=True, slots=True)
class Study:
    """One task and the optimizers that are compared on it; the first contender is the baseline.

    Attributes:
        name: of its results.
        title: the task and the model in a few words.
        program: a file of launch/.
        arguments: its command line, size of the model and validation.
        corpus: what `launch/fetch_data.py` calls its data.
        steps, small_steps: optimizer steps of the baseline's run under the full and under the small protocol.
        evaluations: validations in a run of that length, which is how finely steps are told.
        batch: samples of a rank in a step, in place of the JSONs'.
        ranks: of each job; each has a core.
        alike: the contenders are expected to end alike: how far apart they end is the figure, not who is first.
    """

    name: str
    title: str
    program: str
    arguments: tuple[str, ...]
    corpus: str
    steps: int
    small_steps: int
    contenders: tuple[Contender, ...]
    evaluations: int = 40
    batch: int | None = None
    ranks: int = 1
    alike: bool = False

    @property
    def baseline(self) -> Contender:
        return self.contenders[0]

    def contender(self, name: str) -> Contender:
        return next(contender for contender in self.contenders if contender.name == name)


@dataclass(frozen=True, slots=True)
class Job:
    """One run of a study's program.

    Attributes:
        schedule: the length of its cosine schedule, which is the run's.
        eval_interval: steps between validations.
    """

    study: Study
    contender: Contender
    lr: float
    seed: int
    schedule: int
    eval_interval: int

    @property
    def name(self) -> str:
        contender = re.sub(r"\W+", "-", self.contender.name)
        return f"{contender}-lr{self.lr:g}-{self.schedule}steps-seed{self.seed}"


@dataclass(frozen=True, slots=True)
class Protocol:
    """How thoroughly studies are run.

    Attributes:
        seeds: of weights and batches; the first is the one that learning rates are chosen with.
        grid: whether learning rates are chosen from each contender's grid, which grows until the best has neighbours
            on both sides, or are the middle of it.
        small: whether runs are as short as the study's small ones, and validated as rarely as that allows.
    """

    name: str
    seeds: tuple[int, ...]
    grid: bool
    small: bool

    def steps(self, study: Study) -> int:
        return study.small_steps if self.small else study.steps

    def search(self, study: Study) -> list[Job]:
        """The runs that learning rates are chosen from, the longest-running contenders first."""
        return [
            self.trial(study, contender, lr) for contender in reversed(study.contenders) for lr in self.rates(contender)
        ]

    def trial(self, study: Study, contender: Contender, lr: float) -> Job:
        """A run that a learning rate is judged by."""
        return self.job(study, contender, lr, self.seeds[0])

    def final(self, study: Study, chosen: dict[str, float]) -> list[Job]:
        """The runs that figures are taken from, given every contender's learning rate."""
        return [
            self.job(study, contender, chosen[contender.name], seed)
            for seed in self.seeds
            for contender in reversed(study.contenders)
        ]

    def rates(self, contender: Contender) -> Sequence[float]:
        return contender.lrs if self.grid else [contender.lrs[len(contender.lrs) // 2]]

    def job(self, study: Study, contender: Contender, lr: float, seed: int) -> Job:
        """One run of the study's program."""
        steps, evaluations = self.steps(study), _SMALL_EVALUATIONS if self.small else study.evaluations
        return Job(study, contender, lr, seed, round(contender.horizon * steps), max(1, steps // evaluations))


SMALL = Protocol("small", (0,), grid=False, small=True)
FULL = Protocol("full", (0, 1, 2), grid=True, small=False)
