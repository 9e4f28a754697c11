"""The evidence's machinery: what jobs a protocol makes, how studies are carried out, and what is written of them."""

from __future__ import annotations

import json
import math
import re
import subprocess
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import benchmarks.evidence.__main__ as evidence
from benchmarks.evidence import execution, jobs, parts
from benchmarks.evidence.jobs import OF_SCHEDULE, Cores, JobError, Result, arguments, effective_config
from benchmarks.evidence.outcome import Outcome, from_json, to_json
from benchmarks.evidence.parts import PARTS
from benchmarks.evidence.protocol import FULL, SMALL, Job, Protocol, Study, Tuning
from benchmarks.evidence.report import draw, to_markdown
from benchmarks.evidence.search import Settings
from benchmarks.evidence.studies import STUDIES
from benchmarks.evidence.summary import summary
from corpora import CORPORA
from ds_shampoo.config import ShampooConfig
from gpt.model import GPT, GPTConfig
from optimizers import take_optimizer
from tests.benchmarks.evidence_runs import AXES, FIRST, LOSS, SECOND, STUDY, ended, pace, sloping

ROOT = Path(__file__).resolve().parents[2]
TWO_SEEDS = Protocol("made", (0, 1), tuning_seed=7, most_trials=None, horizons=True, small=False)
ONE_SEED = replace(TWO_SEEDS, seeds=(0,))


class Machine(Cores):
    """Cores on which a job is done at once: its end is told by its contender's best rate and its schedule."""

    def __init__(self, best: dict[str, float], gain: float = 0.0) -> None:
        super().__init__(Path(), [0])
        self.best, self.gain = best, gain
        self.done: list[Job] = []
        self.lock = threading.Lock()

    def run(self, job: Job) -> Result:
        with self.lock:
            self.done.append(job)
        off = abs(math.log2(float(job.settings["lr"]) / self.best[job.contender.name]))  # type: ignore[arg-type]
        gain = self.gain if job.contender.name == SECOND.name else 0.0
        final = 3.0 + off - gain - math.log2(job.horizon) + 0.001 * job.seed
        end = {"step": job.schedule, "seconds": pace(job.contender) * job.schedule, "val_loss": final}
        return Result(job, LOSS, [end], "abc")


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """These studies need none."""
    monkeypatch.setattr(execution, "prepare", lambda _: None)


def test_trials_are_of_other_data_and_another_seed_than_what_is_judged() -> None:
    machine = Machine({"Muon": 4.0, "Shampoo": 8.0}, gain=0.1)
    outcome = execution.carry_out(STUDY, TWO_SEEDS, machine)
    trials, runs = ([job for job in machine.done if job.tuning == tuning] for tuning in (True, False))
    assert {(job.corpus, job.seed, job.schedule) for job in trials} == {("python_docs", 7, 50)}
    assert {(job.corpus, job.seed) for job in runs} == {("gutenberg", 0), ("gutenberg", 1)}
    for contender in (FIRST, SECOND):
        assert len(outcome.trials_of(contender)) == STUDY.tuning.budget, "as many for everybody"  # type: ignore[union-attr]
    assert outcome.chosen == {"Muon": {"lr": 4.0}, "Shampoo": {"lr": 8.0}}
    assert {job.settings["lr"] for job in runs if job.contender == SECOND} == {8.0}
    with pytest.raises(ValueError, match=r"tuning_seed = 1: must be none of the seeds"):
        replace(TWO_SEEDS, tuning_seed=1)


@pytest.mark.parametrize(
    ("gain", "horizons"), [(0.1, [1.0, 0.8]), (0.5, [1.0, 0.8, 0.5]), (9.0, [1.0, 0.8, 0.5]), (-0.1, [1.0, 1.5])]
)
def test_schedules_go_towards_the_baseline_s_end_until_it_is_crossed(gain: float, horizons: list[float]) -> None:
    machine = Machine({"Muon": 2.0, "Shampoo": 2.0}, gain)
    outcome = execution.carry_out(STUDY, TWO_SEEDS, machine)
    assert [run.job.horizon for run in outcome.all_of(SECOND)] == [h for h in horizons for _ in TWO_SEEDS.seeds]
    assert {run.job.horizon for run in outcome.all_of(FIRST)} == {1.0}
    assert [run.job.schedule for run in outcome.all_of(SECOND)][::2] == [round(100 * horizon) for horizon in horizons]
    if horizons[-1] != 0.5 or gain < 1:
        assert outcome.figure(SECOND, FIRST).crossing.steps == pytest.approx(2**-gain)


def test_under_the_small_protocol_all_have_one_schedule_and_few_trials() -> None:
    machine = Machine({"Muon": 2.0, "Shampoo": 2.0}, gain=0.5)
    study = replace(STUDY, batch=64)
    execution.carry_out(study, SMALL, machine)
    assert len(machine.done) == 2 * 2 + 2
    assert {(job.horizon, job.schedule, job.batch) for job in machine.done} == {(1.0, 20, 8)}


def test_settings_go_on_from_another_study_s_choice() -> None:
    study = replace(STUDY, tuning=Tuning("python_docs", 50, 1, after="before"))
    before: dict[str, Settings] = {"Shampoo": {"lr": 8.0, "gone": 1.0}}
    outcome = execution.carry_out(study, TWO_SEEDS, Machine({"Muon": 2.0, "Shampoo": 2.0}), before=before)
    assert outcome.chosen == {"Muon": {"lr": 2.0}, "Shampoo": {"lr": 8.0}}


def test_a_contender_may_have_another_s_json() -> None:
    untuned = replace(SECOND, name="As Muon", settings={"eps": 1.0}, axes=(), json_of="Muon")
    first = replace(FIRST, settings={**FIRST.settings, "embedding_lr_scale": 4.0})
    study = replace(STUDY, contenders=(first, SECOND, untuned))
    machine = Machine({"Muon": 4.0, "Shampoo": 8.0, "As Muon": 1.0})
    outcome = execution.carry_out(study, TWO_SEEDS, machine)
    assert outcome.chosen["As Muon"] == {"lr": 4.0, "eps": 1.0}
    assert not outcome.trials_of(untuned)
    assert [run.job.settings for run in outcome.of(untuned)] == [{"lr": 4.0, "eps": 1.0}] * 2
    kept = execution.carry_out(replace(study, contenders=(first, SECOND)), TWO_SEEDS, machine)
    again = execution.carry_out(study, TWO_SEEDS, machine, kept=replace(kept, study=study))
    assert again.chosen == outcome.chosen


def test_a_study_goes_on_only_from_one_that_has_results(tmp_path: Path) -> None:
    study = replace(STUDY, tuning=Tuning("python_docs", 50, 1, after="before"))
    with pytest.raises(ValueError, match=r"made: its settings go on from those of before, of which .* is not there"):
        evidence.chosen_before(study, tmp_path)
    (tmp_path / "before.json").write_text('{"chosen": {"Muon": {"lr": 4.0}}}')
    assert evidence.chosen_before(study, tmp_path) == {"Muon": {"lr": 4.0}}
    assert evidence.chosen_before(STUDY, tmp_path) == {}


def test_only_what_the_results_lack_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = {"Muon": 4.0, "Shampoo": 8.0}
    alone = execution.carry_out(replace(STUDY, contenders=(FIRST,)), TWO_SEEDS, Machine(best))
    evidence.write(alone, tmp_path)
    kept = evidence.read(STUDY, TWO_SEEDS, tmp_path / "made.json")
    assert kept.lacking == (SECOND,)
    evidence.write(kept.complete(), tmp_path)
    assert "made: its results lack Shampoo, which --missing runs" in capsys.readouterr().out
    machine = Machine(best)
    both = execution.carry_out(STUDY, TWO_SEEDS, machine, kept=kept)
    assert {job.contender for job in map(Named, machine.done)} == {"Shampoo"}
    assert to_json(both)["runs"][:2] == to_json(alone)["runs"]
    machine = Machine(best)
    assert to_json(execution.carry_out(STUDY, TWO_SEEDS, machine, kept=both)) == to_json(both)
    assert not machine.done
    with pytest.raises(ValueError, match=r"made: its results come from .*: seconds do not compare"):
        execution.carry_out(STUDY, TWO_SEEDS, machine, kept=replace(kept, machine={"cpu": "another"}))


class Named:
    """A job by its contender's name."""

    def __init__(self, job: Job) -> None:
        self.contender = job.contender.name


def made(finals: dict[float, tuple[float, ...]], study: Study = STUDY) -> Outcome:
    """An outcome whose baseline ends at 2.0 and 2.02, and the other at these by schedule."""
    runs = [ended(FIRST, final, seed, study=study) for seed, final in enumerate((2.0, 2.02))]
    runs += [ended(SECOND, e, s, horizon=h, study=study) for h, each in finals.items() for s, e in enumerate(each)]
    trials = [replace(run, job=replace(run.job, tuning=True)) for run in runs[:3:2]]
    chosen: dict[str, Settings] = {"Muon": {"lr": 2.0}, "Shampoo": {"lr": 8.0}}
    return Outcome(study, TWO_SEEDS, trials, runs, chosen, {"cpu": "one"})


def cells(text: str, *starts: str) -> list[list[str]]:
    """The cells of a table's rows that begin so."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return [row for row in rows if tuple(row[: len(starts)]) == starts]


def test_a_report_says_what_was_run(tmp_path: Path) -> None:
    outcome = made({1.0: (1.9, 1.92), 0.8: (2.1, 2.12)})
    text = to_markdown(outcome)
    main, level, short = cells(text, "Shampoo")
    # Halfway between 1.91 and 2.11 to 2.01: the root of 0.8 of the steps, each of which takes three times as long;
    # the standard error is 0.0141.
    assert main[1:6] == ["1.9100 (1.9000 to 1.9200)", "3000", "0.89 (0.88 to 0.91)", "2.68 (2.64 to 2.73)", "1"]
    assert level[1:] == ["1", "100", "1.9000, 1.9200", "2 of 2", "7.1", "3.00"]
    assert short[1:] == ["0.8", "80", "2.1000, 2.1200", "0 of 2", "-7.1", "2.40"]
    assert "Run by commit abc." in text
    assert "chosen on `python_docs`, seed 7" in text
    assert "at most 4 trials for every optimizer" in text
    assert "a sigma of 0.014 (3 degrees of freedom" in text
    assert "- Shampoo (`Shampoo`): `lr` 8; at an end of what it may be: `lr`." in text
    assert "- Shampoo, 1 trial:\n  - the start, `lr` 2: 1.9000, chosen" in text
    (row,) = cells(summary([outcome]), "", "", "Shampoo")
    assert row[3:] == [main[1], main[3], main[4], "1", "1.00", ""]
    (first,) = cells(summary([outcome]), "[A study made by hand](made.md)")
    assert (first[2], first[-1]) == ("Muon", "abc")
    draw(outcome, tmp_path / "made.png")
    assert (tmp_path / "made.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_not_all_seeds_reach_is_told_in_full() -> None:
    outcome = made({1.0: (1.9, 2.2), 1.5: (2.05, math.nan)})
    text = to_markdown(outcome)
    main, long, level = cells(text, "Shampoo")
    assert main[3] == "above 1.50"
    assert main[5:7] == ["not shown", "1 of 2, ends at 1.9000, 2.2000"]
    assert long[3:5] == ["2.0500, diverged", "0 of 2"]
    assert level[4] == "1 of 2"
    assert "| - |" not in text + summary([outcome])
    assert json.loads(json.dumps(to_json(outcome), allow_nan=False))["runs"][-1]["final"] is None


def test_results_that_were_kept_give_the_same_report() -> None:
    runs = [
        sloping(contender, slope, seed) for seed in range(2) for contender, slope in ((FIRST, 0.01), (SECOND, 0.02))
    ]
    for run in runs:
        run.records[-1]["final_bleu"] = 3.0
    runs += [ended(SECOND, math.nan, seed, horizon=0.8) for seed in range(2)]
    trials = made({1.0: (1.9, math.nan)}).trials
    outcome = Outcome(STUDY, TWO_SEEDS, trials, runs, {"Muon": {"lr": 2.0}, "Shampoo": {"lr": 2.0}}, {"cpu": "one"})
    kept = json.loads(json.dumps(to_json(outcome)))
    again = from_json(STUDY, TWO_SEEDS, kept)
    assert to_json(again) == kept
    assert to_markdown(again) == to_markdown(outcome)
    with pytest.raises(ValueError, match="made: its results are of Shampoo too: run it again"):
        from_json(replace(STUDY, contenders=(FIRST,)), TWO_SEEDS, kept)


def test_what_should_be_alike_is_told_by_how_far_apart_it_ends() -> None:
    outcome = made({1.0: (1.9, 1.93)}, replace(STUDY, alike=True, tuning=None))
    text = to_markdown(outcome)
    assert cells(text, "Shampoo") == [["Shampoo", "1.9150 (1.9000 to 1.9300)", "3000", "-0.0950 (-0.1000 to -0.0900)"]]
    assert "steps to" not in text
    assert summary([outcome]).endswith("- [A study made by hand](made.md)\n")


def test_a_job_s_json_has_its_settings() -> None:
    settings: Settings = {"lr": 0.5, "betas.1": 0.9, "betas.0": 0.8, "momentum_warmup": 0.25, "eps": 1e-8}
    settings = {**settings, "scheduler.warmup_num_steps": 0.1, "scheduler.cos_min_ratio": 0.2}
    job = Job(replace(STUDY, config="bert_adamw.json", batch=64), FIRST, settings, 3, 1.0, 80, 10)
    config = effective_config(job)
    params = {"lr": 0.5, "betas": [0.8, 0.9], "momentum_warmup": 20, "eps": 1e-8}
    assert config["optimizer"] == {"type": "TorchMuon", "params": params}
    assert config["scheduler"]["params"]["warmup_num_steps"] == 8
    assert config["scheduler"]["params"]["cos_min_ratio"] == 0.2
    assert config["train_micro_batch_size_per_gpu"] == 64
    assert "zero_optimization" not in config
    assert "zero_optimization" in effective_config(replace(job, study=replace(job.study, ranks=2)))
    short = effective_config(replace(job, schedule=1))
    assert short["scheduler"]["params"]["warmup_num_steps"] == 1
    assert list(arguments(job))[:6] == ["--data", "data/gutenberg", "--steps", "80", "--seed", "3"]


def launcher(monkeypatch: pytest.MonkeyPatch, script: str) -> Callable[[], int]:
    """Puts a shell script in the launcher's place; returns how often it was called."""
    calls = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        if command[0] == "git":
            return real(command, **options)
        calls.append(command)
        folder = Path(command[command.index("--runs") + 1]) / command[command.index("--name") + 1]
        options.pop("preexec_fn")
        return real(["bash", "-c", script], **{**options, "cwd": folder})

    real = subprocess.run
    monkeypatch.setattr(jobs.subprocess, "run", run)
    return lambda: len(calls)


WRITES = """echo '{"metric": {"key": "val_loss", "label": "loss", "better": "lower"}}' > config.json
echo '{"step": 1, "val_loss": 2.0, "seconds": 9.0, "processor_seconds": 1.0}' > metrics.jsonl
"""


def test_a_job_that_is_done_is_read_and_keeps_the_name_of_its_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launched = launcher(monkeypatch, WRITES)
    job = TWO_SEEDS.trial(STUDY, FIRST, {"lr": 1.0})
    for code, said in (("one", "on core 0"), ("one", ""), ("two", "was run by another state of the code: one")):
        monkeypatch.setattr(jobs, "present_commit", lambda code=code: code)
        found = jobs.run_job(job, tmp_path, frozenset({0}))
        assert (found.final, found.seconds, found.commit, found.diverged) == (2.0, 1.0, "one", None)
        printed = capsys.readouterr().out
        assert said in printed
        assert bool(said) == bool(printed)
    jobs.run_job(TWO_SEEDS.trial(replace(STUDY, ranks=2), FIRST, {"lr": 1.0}), tmp_path, frozenset({0}))
    assert launched() == 2
    metrics = tmp_path / STUDY.name / job.name / "metrics.jsonl"
    metrics.write_text('{"step": 1, "val_loss": 3.0, "seconds": 9.0}\n')
    assert jobs.run_job(job, tmp_path, frozenset({0})).seconds == 1.0, "an earlier release's is run again"


def test_a_run_that_diverges_is_a_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    launched = launcher(monkeypatch, WRITES + "echo 'error: the loss is nan at step 2'; exit 1")
    job = TWO_SEEDS.trial(STUDY, FIRST, {"lr": 1.0})
    for _ in range(2):
        found = jobs.run_job(job, tmp_path, frozenset({0}))
        assert (found.diverged, found.score) == (2, math.inf)
    assert launched() == 1


def test_a_job_that_fails_ends_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    launched = launcher(monkeypatch, "echo no such thing; exit 1")
    cores = Cores(tmp_path, [0])
    with pytest.raises(JobError, match=r"exit status 1; the end of .*:\nno such thing"):
        cores.each(cores.run, [TWO_SEEDS.trial(STUDY, FIRST, {"lr": float(lr)}) for lr in range(5)])
    assert launched() == 1
    with pytest.raises(JobError, match="1 cores for jobs of 2 ranks"):
        Cores(tmp_path, [0], ranks=2)


def test_the_state_of_the_code_is_told_by_code_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(jobs, "ROOT", tmp_path)
    assert jobs.present_commit() is None
    for name in ("launch/train.py", "docs/results.md"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("first")
    git = ["git", "-c", "user.name=a", "-c", "user.email=b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    name = jobs.present_commit()
    assert name is not None
    assert not name.endswith("-dirty")
    (tmp_path / "docs/results.md").write_text("second")
    (tmp_path / "log.txt").write_text("new")
    assert jobs.present_commit() == name
    (tmp_path / "launch/train.py").write_text("second")
    assert jobs.present_commit() == f"{name}-dirty"


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_every_study_can_be_carried_out(study: Study) -> None:
    assert (ROOT / "launch" / study.program).exists()
    assert study.corpus in CORPORA.keys() | PARTS.keys()
    if study.tuning:
        assert study.tuning.corpus in CORPORA.keys() | PARTS.keys()
        assert study.tuning.corpus != study.corpus
        assert study.tuning.after is None or study.tuning.after in {other.name for other in STUDIES}
    names = set()
    for contender in study.contenders:
        assert bool(contender.axes) == bool(study.tuning and contender.json_of is None)
        start = contender.settings
        if contender.json_of is not None:
            start = contender.with_json_of(study.contender(contender.json_of).settings)
        job = FULL.run(study, contender, start, seed=0)
        config = effective_config(job)
        assert config["scheduler"]["params"]["warmup_num_steps"] < job.schedule / 2
        for axis in contender.axes:
            axis.around(start[axis.key])
            for value in axis.values:
                settings = {**start, axis.key: value}
                refuse_bad_settings(effective_config(replace(job, settings=settings)))
        refuse_bad_settings(config)
        names.add(job.name)
    assert len(names) == len(study.contenders)
    assert all(re.fullmatch(r"[\w.-]+", name) for name in names)


def refuse_bad_settings(config: dict) -> None:  # type: ignore[type-arg]
    """Raises where an optimizer section can't be used."""
    section = config["optimizer"]
    if section["type"] == "Shampoo":
        ShampooConfig(**section["params"])
    elif section["type"] == "SGD":
        torch.optim.SGD([torch.zeros(1)], **section["params"])
    else:
        assert take_optimizer(config, GPT(GPTConfig(layers=1, d_model=8, heads=1, context=4))) is not None


def test_warm_ups_are_parts_of_the_schedule_everywhere() -> None:
    for contender in (each for study in STUDIES for each in study.contenders if each.json_of is None):
        assert "scheduler.warmup_num_steps" in contender.settings
        for key in OF_SCHEDULE & contender.settings.keys():
            assert 0 <= float(contender.settings[key]) < 1  # type: ignore[arg-type]


def test_a_tiny_study_from_trials_to_tables(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real jobs under the real launcher: a model of one layer on a text for each side."""
    monkeypatch.setattr(parts, "DATA", tmp_path)
    for name, text in (("tuned", "one and two and three, "), ("judged", "the quick brown fox jumps, ")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(text * 200)
    size = ("--layers", "1", "--d-model", "16", "--heads", "2", "--context", "16", "--eval-windows", "8")
    muon = replace(FIRST, settings={"lr": 0.02, "momentum_warmup": 0.5, "scheduler.warmup_num_steps": 0.25})
    axes = (replace(AXES[0], values=(0.01, 0.02, 1e30)),)
    other = replace(
        SECOND,
        name="Prototype",
        type="benchmarks.prototypes:FacebookShampoo",
        settings={"lr": 0.02, "embedding_lr_scale": 4.0, "scheduler.warmup_num_steps": 0.25},
        axes=(),
    )
    study = replace(
        STUDY,
        arguments=size,
        corpus="judged",
        steps=8,
        evaluations=4,
        contenders=(replace(muon, axes=axes), other),
        tuning=Tuning("tuned", steps=4, budget=2),
        horizons=(0.5, 1.5),
    )
    outcome = execution.carry_out(study, ONE_SEED, Cores(tmp_path / "runs", [0, 1]))
    # The rate is 0 in the first step.
    assert [trial.diverged for trial in outcome.trials] == [None, 4]
    assert outcome.chosen["Muon"]["lr"] == 0.02
    ran = [(run.job.contender.name, run.job.schedule) for run in outcome.runs]
    assert ran[:2] == [("Muon", 8), ("Prototype", 8)]
    assert ran[2] in (("Prototype", 4), ("Prototype", 12))
    assert all(math.isfinite(run.final) for run in outcome.runs)
    monkeypatch.setattr(evidence, "STUDIES", (study,))
    evidence.write(outcome, tmp_path)
    assert {"made.json", "made.md", "made.png", "README.md"} <= {file.name for file in tmp_path.iterdir()}
    assert "`lr` 1e+30: diverged" in capsys.readouterr().out
    config = json.loads((tmp_path / "runs" / "made" / outcome.runs[0].job.name / "config.json").read_text())
    assert config["deepspeed"]["optimizer"]["params"]["momentum_warmup"] == 4
