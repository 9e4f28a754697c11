"""What is run: studies, their contenders, and the jobs that a protocol makes of them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.evidence.search import Axis, Settings

# A validation costs as much as many steps; a small run's curve needs a few of them.
_SMALL_EVALUATIONS = 4
# A small run's batch, in parts of the study's.
_SMALL_BATCH = 8


@dataclass(frozen=True)
class Contender:
    """One optimizer in a study.

    Attributes:
        name: as tables have it.
        type: of the JSON's optimizer section.
        settings: of that section, by their keys; "betas.1" is an element of a list, "scheduler.KEY" a setting of the
            schedule. Those of `jobs.OF_SCHEDULE` are parts of the schedule's length.
        axes: which of them are tuned; the others stay.
        json_of: another contender, tuned before: this one has its JSON with another `type`, and no trials.
    """

    name: str
    type: str
    settings: Settings
    axes: tuple[Axis, ...] = ()
    json_of: str | None = None

    def with_json_of(self, chosen: Settings) -> Settings:
        """Its settings where the other's choice is this: all of them, but the roles' scales, which are no AdamW's."""
        return {**{key: value for key, value in chosen.items() if not key.endswith("_lr_scale")}, **self.settings}


@dataclass(frozen=True, slots=True)
class Tuning:
    """Where a study's settings are chosen: on other data than it is judged by, with another seed.

    Attributes:
        corpus: what `launch/fetch_data.py` or `parts.PARTS` calls the data.
        steps: of every trial.
        budget: how many trials each contender has.
        after: the study whose chosen settings are the trials' start, for contenders of the same name there.
    """

    corpus: str
    steps: int
    budget: int
    after: str | None = None


@dataclass(frozen=True)
class Study:
    """One task and the optimizers that are compared on it; the first contender is the baseline.

    Attributes:
        name: of its results.
        title: the task and the model in a few words.
        program: a file of launch/.
        arguments: its command line, size of the model and validation.
        config: a file of configs/, of which every contender takes all but the optimizer section.
        corpus: what `launch/fetch_data.py` or `parts.PARTS` calls the data that it is judged by.
        steps, small_steps: optimizer steps of the baseline's run under the full and under the small protocol.
        tuning: where settings are chosen; None takes the contenders' settings as they are.
        horizons: other lengths that a contender's schedules may have, in parts of the baseline's steps, ascending.
        evaluations: validations in a run of the baseline's length.
        batch: samples of a rank in a step, in place of the JSON's.
        ranks: of each job; each has a core.
        alike: the contenders are expected to end alike: how far apart they end is the figure, not who is first.
    """

    name: str
    title: str
    program: str
    arguments: tuple[str, ...]
    config: str
    corpus: str
    steps: int
    small_steps: int
    contenders: tuple[Contender, ...]
    tuning: Tuning | None = None
    horizons: tuple[float, ...] = (0.8, 0.9)
    evaluations: int = 40
    batch: int | None = None
    ranks: int = 1
    alike: bool = False

    @property
    def baseline(self) -> Contender:
        return self.contenders[0]

    def contender(self, name: str) -> Contender:
        return next(contender for contender in self.contenders if contender.name == name)


@dataclass(frozen=True)
class Job:
    """One run of a study's program.

    Attributes:
        settings: all of the contender's, tuned ones in their place.
        horizon: the length of the run, in parts of the baseline's judged run (of a trial's, for a trial: 1).
        schedule: the same in steps; it is the length of the cosine schedule too.
        eval_interval: steps between validations.
        tuning: whether it is a trial.
        small: whether its batch is a small one.
    """

    study: Study
    contender: Contender
    settings: Settings
    seed: int
    horizon: float
    schedule: int
    eval_interval: int
    tuning: bool = False
    small: bool = False

    @property
    def corpus(self) -> str:
        tuning = self.study.tuning if self.tuning else None
        return tuning.corpus if tuning else self.study.corpus

    @property
    def batch(self) -> int | None:
        """Samples of a rank in a step; None leaves the JSON's."""
        if self.study.batch is None or not self.small:
            return self.study.batch
        return max(1, self.study.batch // _SMALL_BATCH)

    @property
    def name(self) -> str:
        """Of its folder: two jobs of a study with one name are one job."""
        contender = re.sub(r"\W+", "-", self.contender.name)
        digest = hashlib.sha256(json.dumps(sorted(self.settings.items())).encode()).hexdigest()[:8]
        kind = "trial" if self.tuning else "run"
        return f"{contender}-{kind}-{self.schedule}steps-seed{self.seed}-{digest}"


@dataclass(frozen=True, slots=True)
class Protocol:
    """How thoroughly studies are run.

    Attributes:
        seeds: of the weights and batches of the runs that are judged.
        tuning_seed: of the trials.
        most_trials: of a contender, however large its study's budget; None for no limit.
        horizons: whether contenders run on schedules of other lengths than the baseline's too.
        small: whether runs are as short as the study's small ones, in small batches, and validated rarely.
    """

    name: str
    seeds: tuple[int, ...]
    tuning_seed: int
    most_trials: int | None
    horizons: bool
    small: bool

    def __post_init__(self) -> None:
        if self.tuning_seed in self.seeds:
            raise ValueError(f"tuning_seed = {self.tuning_seed}: must be none of the seeds that runs are judged by")

    def steps(self, study: Study) -> int:
        return study.small_steps if self.small else study.steps

    def budget(self, tuning: Tuning) -> int:
        return tuning.budget if self.most_trials is None else min(tuning.budget, self.most_trials)

    def trial(self, study: Study, contender: Contender, settings: Settings) -> Job:
        """A run that settings are judged by, at its end."""
        assert study.tuning is not None, "trials belong to a study's tuning"
        steps = min(study.small_steps, study.tuning.steps) if self.small else study.tuning.steps
        return Job(study, contender, settings, self.tuning_seed, 1.0, steps, steps, tuning=True, small=self.small)

    def run(self, study: Study, contender: Contender, settings: Settings, *, seed: int, horizon: float = 1.0) -> Job:
        """A run that figures are taken from."""
        steps, evaluations = self.steps(study), _SMALL_EVALUATIONS if self.small else study.evaluations
        interval = max(1, steps // evaluations)
        return Job(study, contender, settings, seed, horizon, round(horizon * steps), interval, small=self.small)

    def start(self, study: Study, contender: Contender, chosen: Mapping[str, Settings]) -> Settings:
        """What a contender's first trial is made with, given every contender's choice of the study before."""
        before = chosen.get(contender.name, {}) if study.tuning and study.tuning.after else {}
        tuned = {axis.key for axis in contender.axes}
        return {**contender.settings, **{key: value for key, value in before.items() if key in tuned}}


SMALL = Protocol("small", (0,), tuning_seed=100, most_trials=2, horizons=False, small=True)
FULL = Protocol("full", (0, 1, 2), tuning_seed=100, most_trials=None, horizons=True, small=False)
