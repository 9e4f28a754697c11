"""The evidence's arithmetic, on runs made by hand, and that every study can be carried out as it is written down."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import benchmarks.evidence.__main__ as evidence
from benchmarks.evidence import execution, jobs
from benchmarks.evidence.figures import Spread, best_rate, compare, difference, next_rate, reached
from benchmarks.evidence.jobs import Result, arguments, effective_config
from benchmarks.evidence.outcome import Outcome, from_json, to_json
from benchmarks.evidence.protocol import FULL, SMALL, Contender, Job, Study
from benchmarks.evidence.report import draw, to_markdown
from benchmarks.evidence.studies import STUDIES
from benchmarks.evidence.summary import summary
from corpora import CORPORA
from metric import Metric

ROOT = Path(__file__).resolve().parents[2]
LOSS, ACCURACY = Metric("val_loss", "loss", "lower"), Metric("val_accuracy", "accuracy", "higher")
FIRST = Contender("AdamW", "gpt_zero2_adamw.json", (1.0, 2.0, 4.0))
SECOND = Contender("Shampoo", "gpt_zero2_shampoo.json", (1.0, 2.0, 4.0), horizon=0.5)
STUDY = Study(
    "made", "A study made by hand", "pretrain_gpt.py", (), "gutenberg", 100, 20, (FIRST, SECOND), evaluations=10
)


def result(contender: Contender, slope: float, seed: int = 0, steps: int = 100, metric: Metric = LOSS) -> Result:
    """A run whose metric improves by `slope` a step and that takes a second a step, three for the second contender."""
    sign = -1 if metric.better == "lower" else 1
    pace = 1.0 if contender is FIRST else 3.0
    records = [{"step": step, "loss": 1.0, "seconds": pace * step} for step in range(1, steps + 1)]
    for record in records[9::10]:
        record[metric.key] = 10 + sign * slope * record["step"]
    return Result(Job(STUDY, contender, 2.0, seed, steps, 10), metric, records)


@pytest.mark.parametrize("metric", [LOSS, ACCURACY])
def test_the_figure_is_where_the_baseline_s_end_was_reached(metric: Metric) -> None:
    baseline = [result(FIRST, 0.01, metric=metric)]
    figure = compare([result(SECOND, 0.02, metric=metric)], baseline)
    assert figure.steps == Spread(0.5, 0.5, 0.5)
    assert figure.seconds == Spread(1.5, 1.5, 1.5)
    assert figure.faster == Spread(2.0, 2.0, 2.0)


def test_a_validation_that_comes_late_counts_late() -> None:
    # It gets there at step 34 and is validated at step 40.
    assert reached(result(SECOND, 0.03), result(FIRST, 0.01).final) == (40, 120.0)


def test_the_median_is_over_seeds_and_each_is_compared_with_its_own_baseline() -> None:
    baselines = [result(FIRST, slope, seed) for seed, slope in enumerate((0.01, 0.02, 0.01))]
    runs = [result(SECOND, 0.02, seed) for seed in range(3)]
    assert compare(runs, baselines).steps == Spread(0.5, 0.5, 1.0)


def test_a_seed_that_never_got_there_leaves_no_median() -> None:
    baselines = [result(FIRST, 0.01, seed) for seed in range(2)]
    figure = compare([result(SECOND, 0.02, 0), result(SECOND, 0.001, 1)], baselines)
    assert (figure.steps, figure.reached, figure.seeds) == (None, 1, 2)


def test_a_baseline_that_was_there_before_its_end_counts_from_then() -> None:
    baseline = result(FIRST, 0.01)
    for record in baseline.records[69::10]:  # from step 70 on it is no better than it ends
        record["val_loss"] = baseline.final
    figure = compare([result(SECOND, 0.02)], [baseline])
    assert figure.steps == Spread(50 / 70, 50 / 70, 50 / 70)
    assert figure.seconds == Spread(150 / 70, 150 / 70, 150 / 70)


def test_ends_are_compared_seed_by_seed() -> None:
    baselines = [result(FIRST, slope, seed) for seed, slope in enumerate((0.01, 0.05, 0.03))]
    runs = [result(SECOND, slope, seed) for seed, slope in enumerate((0.011, 0.049, 0.03))]
    found = difference(runs, baselines[::-1])
    assert (found.median, found.least, found.most) == pytest.approx((0.0, -0.1, 0.1))


def at(lr: float, slope: float, contender: Contender = FIRST, metric: Metric = LOSS) -> Result:
    """A run at this learning rate."""
    made = result(contender, slope, metric=metric)
    return Result(Job(STUDY, contender, lr, 0, 100, 10), metric, made.records)


def test_the_best_rate_is_told_by_the_metric_s_better_way() -> None:
    for metric in (LOSS, ACCURACY):
        slopes = {1.0: float("nan"), 2.0: 0.03, 4.0: 0.02}
        assert best_rate([at(lr, slope, metric=metric) for lr, slope in slopes.items()]) == 2.0


def test_a_grid_grows_where_its_best_lacks_a_neighbour() -> None:
    assert next_rate([at(1.0, 0.01), at(2.0, 0.03), at(4.0, 0.02)]) is None
    assert next_rate([at(4.0, 0.03), at(1.0, 0.01), at(2.0, 0.02)]) == 8.0
    assert next_rate([at(1.0, 0.03), at(2.0, 0.02), at(4.0, 0.01)]) == 0.5
    assert next_rate([at(4.0, 0.03)]) is None


def test_every_contender_is_tried_until_its_best_rate_has_neighbours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    best = {"AdamW": 2.0, "Shampoo": 32.0}

    def run_all(jobs: Sequence[Job], *_: object) -> list[Result]:
        return [at(job.lr, 1 / (1 + abs(job.lr - best[job.contender.name])), job.contender) for job in jobs]

    monkeypatch.setattr(execution, "run_all", run_all)
    outcome = execution.carry_out(STUDY, FULL, tmp_path, [0])
    assert outcome.chosen == best
    assert rates_tried(outcome) == {"AdamW": [1, 2, 4], "Shampoo": [1, 2, 4, 8, 16, 32, 64]}


def rates_tried(outcome: Outcome) -> dict[str, list[float]]:
    """Every contender's grid."""
    names = outcome.chosen
    return {name: [run.job.lr for run in outcome.search if run.job.contender.name == name] for name in names}


def test_only_what_the_results_lack_is_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []

    def run_all(jobs: Sequence[Job], *_: object) -> list[Result]:
        ran.extend(job.contender.name for job in jobs)
        return [replace(at(job.lr, 0.1 / (1 + abs(job.lr - 2.0)), job.contender), job=job) for job in jobs]

    monkeypatch.setattr(execution, "run_all", run_all)
    alone = execution.carry_out(replace(STUDY, contenders=(FIRST,)), FULL, tmp_path, [0])
    evidence.write(alone, tmp_path)
    kept = evidence.read(STUDY, FULL, tmp_path / "made.json")
    assert kept.lacking == (SECOND,)
    evidence.write(kept.complete(), tmp_path)
    assert "made: its results lack Shampoo, which --missing runs" in capsys.readouterr().out
    assert to_json(evidence.read(STUDY, FULL, tmp_path / "made.json").complete()) == to_json(alone)

    ran.clear()
    both = execution.carry_out(STUDY, FULL, tmp_path, [0], kept)
    assert set(ran) == {"Shampoo"}
    assert rates_tried(both) == {"AdamW": [1, 2, 4], "Shampoo": [1, 2, 4]}
    assert to_json(both)["runs"][:3] == to_json(alone)["runs"]
    assert len(both.runs) == 6
    ran.clear()
    assert to_json(execution.carry_out(STUDY, FULL, tmp_path, [0], both)) == to_json(both)
    assert not ran
    with pytest.raises(ValueError, match=r"made: its results come from .*: seconds do not compare"):
        execution.carry_out(STUDY, FULL, tmp_path, [0], replace(kept, machine={"cpu": "another"}))


def test_the_full_protocol_searches_every_grid_and_runs_every_seed() -> None:
    search, final = FULL.search(STUDY), FULL.final(STUDY, {"AdamW": 2.0, "Shampoo": 4.0})
    assert {(job.contender.name, job.lr) for job in search} == {
        (n, lr) for n in ("AdamW", "Shampoo") for lr in (1, 2, 4)
    }
    assert {job.seed for job in search} == {0}
    assert len(final) == 2 * 3
    assert {(job.contender.name, job.lr, job.schedule) for job in final} == {
        ("AdamW", 2.0, 100), ("Shampoo", 4.0, 50),
    }  # fmt: skip
    assert {(job.schedule, job.eval_interval) for job in SMALL.search(STUDY)} == {(20, 2), (10, 2)}


def test_a_report_says_what_was_run(tmp_path: Path) -> None:
    runs = [result(FIRST, 0.01), result(SECOND, 0.02, steps=50)]
    outcome = Outcome(STUDY, SMALL_BUT_LONG, [at(1.0, 0.02)], runs, {"AdamW": 2.0, "Shampoo": 4.0}, {"cpu": "one"})
    written = json.loads(json.dumps(to_json(outcome)))
    assert written["machine"] == {"cpu": "one"}
    assert [run["schedule"] for run in written["runs"]] == [100, 50]
    assert [figure["faster"]["median"] for figure in written["figures"]] == [2.0, 0.5]
    table = to_markdown(outcome)
    assert "| Shampoo | 4 | 50 | 9.0000 | 3000 | 0.50 | 1.50 |" in table
    (line,) = [line for line in summary([written]).splitlines() if "Shampoo" in line]
    assert line == "|  |  | Shampoo | 4 | 50 | 9.0000 | 2.00 | 0.50 | 1.50 |"
    draw(outcome, tmp_path / "made.png")
    assert (tmp_path / "made.png").read_bytes().startswith(b"\x89PNG")


def test_results_that_were_kept_give_the_same_report() -> None:
    runs = [result(contender, slope, seed) for seed in range(3) for contender, slope in ((FIRST, 0.01), (SECOND, 0.02))]
    runs = [replace(run, commit="abc") for run in runs]
    for run in runs:
        run.records[-1]["final_bleu"] = 3.0
    outcome = Outcome(STUDY, FULL, [at(1.0, 0.02), at(2.0, 0.03)], runs, {"AdamW": 2.0, "Shampoo": 2.0}, {"cpu": "one"})
    kept = json.loads(json.dumps(to_json(outcome)))
    again = from_json(STUDY, FULL, kept)
    assert to_json(again) == kept
    assert to_markdown(again) == to_markdown(outcome)
    with pytest.raises(ValueError, match="made: its results are of Shampoo too: run it again"):
        from_json(replace(STUDY, contenders=(FIRST,)), FULL, kept)


def test_what_should_be_alike_is_told_by_how_far_apart_it_ends() -> None:
    study = replace(STUDY, alike=True)
    runs = [result(FIRST, 0.01), result(SECOND, 0.011)]
    outcome = Outcome(study, SMALL_BUT_LONG, [], runs, {"AdamW": 2.0, "Shampoo": 4.0}, {})
    table = to_markdown(outcome)
    assert "| Shampoo | 4 | 100 | 8.9000 | 3000 | -0.1000 |" in table
    assert "steps to" not in table
    assert summary([to_json(outcome)]).endswith("- [A study made by hand](made.md)\n")


def test_a_job_that_is_done_is_read_and_keeps_the_name_of_its_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launched = []

    def launch(job: Job, _: Path, config: Path, __: object) -> None:
        launched.append(job)
        (config.parent / "config.json").write_text(json.dumps({"metric": LOSS._asdict()}))
        (config.parent / "metrics.jsonl").write_text('{"step": 1, "val_loss": 2.0, "seconds": 1.0}\n')

    monkeypatch.setattr(jobs, "_launch", launch)
    job = FULL.trial(STUDY, FIRST, 1.0)
    for code, said in (("one", "on core 0"), ("one", ""), ("two", "was run by another state of the code: one")):
        monkeypatch.setattr(jobs, "present_commit", lambda code=code: code)
        found = jobs.run_job(job, tmp_path, frozenset({0}))
        assert (found.final, found.commit) == (2.0, "one")
        printed = capsys.readouterr().out
        assert said in printed
        assert bool(said) == bool(printed)
    jobs.run_job(FULL.trial(replace(STUDY, ranks=2), FIRST, 1.0), tmp_path, frozenset({0}))
    assert len(launched) == 2


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


SMALL_BUT_LONG = type(FULL)("made", (0,), grid=False, small=False)


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_every_study_can_be_carried_out(study: Study) -> None:
    assert (ROOT / "launch" / study.program).exists()
    assert study.corpus in CORPORA
    sizes = {len(contender.lrs) for contender in study.contenders}
    assert len(sizes) == 1, "grids of one size"
    assert min(sizes) >= 3 or sizes == {1}, "or the rates of another study"
    for job in FULL.search(study):
        config = effective_config(job)
        assert config["optimizer"]["params"]["lr"] == job.lr
        assert "--seed" in arguments(job)
    for contender in study.contenders:
        ratios = {round(after / before, 9) for before, after in itertools.pairwise(contender.lrs)}
        assert ratios <= {2.0}, "a grid ascends by one factor"
    names = [job.name for job in FULL.final(study, {contender.name: 1.0 for contender in study.contenders})]
    assert len(set(names)) == len(FULL.seeds) * len(study.contenders)
    assert all(re.fullmatch(r"[\w.-]+", name) for name in names)
