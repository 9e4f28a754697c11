"""Saves, loads and conversions that are killed or fail on one rank: the last good checkpoint, or a refusal on all."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ds_shampoo.frameworks.deepspeed import universal as conversion
from ds_shampoo.frameworks.deepspeed.universal import to_universal
from ds_shampoo.state.files import BlockReader, CheckpointError
from tests.distributed import checkpoint_jobs, jobs
from tests.distributed.jobs import SHAMPOO, engine_config
from tests.distributed.pool import WorkerError, WorkerPool

Pools = Callable[[int], WorkerPool]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_save_killed_at_any_write_leaves_the_former_checkpoint(pools: Pools, tmp_path: Path, stage: int) -> None:
    config = engine_config(SHAMPOO, stage, 1)
    (outcomes,) = pools(1).run(checkpoint_jobs.saves_cut_short, config, str(tmp_path), None)
    assert {name for name, _ in outcomes} >= {"save_file", "chmod", "save", "write_text", "replace", "done"}
    latest = [name for name, _ in outcomes].index("done") - 1
    assert [found for _, found in outcomes] == ["first"] * (latest + 1) + ["second"], outcomes


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_under_one_tag_a_save_counts_whole_or_not_at_all(pools: Pools, tmp_path: Path, stage: int) -> None:
    config = engine_config(SHAMPOO, stage, 1)
    (outcomes,) = pools(1).run(checkpoint_jobs.saves_cut_short, config, str(tmp_path), "one")
    found = [outcome for _, outcome in outcomes]
    assert set(found) == {"first", "second"}, outcomes
    assert found == sorted(found), outcomes
    # DeepSpeed's files are moved one after the other when the save counts already.
    assert [name for name, outcome in outcomes if outcome == "second"].count("replace") > 2


def test_ranks_killed_while_they_save_under_one_tag(pools: Pools, tmp_path: Path) -> None:
    config = engine_config(SHAMPOO, 2, 2)
    chance = random.Random(5)
    for attempt in range(4):
        folder, notes = tmp_path / f"job{attempt}", tmp_path / f"notes{attempt}"
        notes.mkdir()
        kill_while_saving(config, folder, notes, chance)
        results = pools(2).run(checkpoint_jobs.state_after_loading, config, str(folder))
        assert not any(message for message, _ in results), results
        lines = [(notes / f"rank{rank}").read_text().splitlines() for rank in range(2)]
        steps = [states.index(state) for states, (_, state) in zip(lines, results, strict=True)]
        assert steps[0] == steps[1] >= len(lines[0]) - 2


def kill_while_saving(config: dict[str, object], folder: Path, notes: Path, chance: random.Random) -> None:
    """Runs two ranks of their own, and kills one of them after a few saves."""
    own = WorkerPool(2)

    def kill() -> None:
        end = time.monotonic() + 120
        while time.monotonic() < end and not (folder / "latest").exists():
            time.sleep(0.02)
        time.sleep(chance.uniform(0.0, 0.5))
        os.kill(chance.choice(own._workers)[0].pid or 0, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        with pytest.raises((WorkerError, EOFError, ConnectionError)):
            own.run(checkpoint_jobs.saving_for_ever, config, str(folder), "one", str(notes))
    finally:
        thread.join()
        for process, _ in own._workers:
            process.kill()
        own.close()


@pytest.mark.parametrize("error", ["OSError", "MemoryError"])
@pytest.mark.parametrize(
    ("what", "rank", "stage"),
    [
        ("latest", 0, 2),
        ("index", 0, 2),
        ("blocks", 1, 2),
        ("digest", 1, 2),
        ("script", 0, 2),
        ("deepspeed", 0, 0),
        ("deepspeed", 1, 2),
        ("deepspeed", 1, 3),
        ("open", 1, 2),
        ("read", 1, 2),
        ("verify", 1, 2),
    ],
)
def test_what_fails_on_one_rank_is_raised_on_all(
    pools: Pools, tmp_path: Path, what: str, rank: int, stage: int, error: str
) -> None:
    config = engine_config(SHAMPOO, stage, 2)
    for message, kind, well in pools(2).run(
        checkpoint_jobs.failing_on_one_rank, config, str(tmp_path), what, rank, error
    ):
        assert kind == "CheckpointError", message
        assert message.startswith(f"rank {rank}: ")
        assert well


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_flipped_bit_of_any_file_is_refused_by_all_ranks(pools: Pools, tmp_path: Path, stage: int) -> None:
    config = engine_config(SHAMPOO, stage, 2)
    pools(2).run(jobs.saving, config, str(tmp_path), 3, 3)
    chance = random.Random(1)
    tag = tmp_path / (tmp_path / "latest").read_text()
    files = [*sorted(tag.rglob("*.pt")), *sorted(tag.rglob("*.safetensors"))]
    damages = [
        (str(path.relative_to(tmp_path)), chance.randrange(8 * path.stat().st_size)) for path in files for _ in range(6)
    ]
    for results in pools(2).run(checkpoint_jobs.damaged_in_turn, config, str(tmp_path), damages):
        silent = [damage for damage, (message, _) in zip(damages, results, strict=True) if not message]
        assert not silent
        assert all(untouched for _, untouched in results)


def test_weights_alone_are_checked_too(pools: Pools, tmp_path: Path) -> None:
    config = engine_config(SHAMPOO, 2, 2)
    pools(2).run(jobs.saving, config, str(tmp_path), 3, 3)
    tag = tmp_path / (tmp_path / "latest").read_text()
    for path in tag.glob("*optim_states.pt"):
        path.unlink()  # which nobody needs for them
    for message, _ in pools(2).run(checkpoint_jobs.weights, config, str(tmp_path)):
        assert message == ""
    path = tag / "mp_rank_00_model_states.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    for message, untouched in pools(2).run(checkpoint_jobs.weights, config, str(tmp_path)):
        assert "mp_rank_00_model_states.pt" in message
        assert untouched


def test_saving_without_a_name_writes_nothing(pools: Pools, tmp_path: Path) -> None:
    (messages,) = pools(1).run(checkpoint_jobs.empty_names, engine_config(SHAMPOO, 2, 1), str(tmp_path))
    assert len(messages) == 4
    assert "must name a folder" in messages[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"\xff", b"gone"])
def test_a_latest_that_names_nothing_is_refused_by_all(pools: Pools, tmp_path: Path, content: bytes) -> None:
    config = engine_config(SHAMPOO, 2, 2)
    (tmp_path / "latest").write_bytes(content)
    for message, untouched in pools(2).run(jobs.failing_to_load, config, str(tmp_path)):
        assert "latest" in message
        assert untouched


UNIVERSAL = {"checkpoint": {"load_universal": True}}


def test_a_conversion_killed_at_any_point_is_not_loaded(
    pools: Pools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second conversion under the same tag: the first, or the second, or a refusal."""
    config = engine_config(SHAMPOO, 2, 1)
    usual = tmp_path / "usual"
    pools(1).run(jobs.saving, config, str(usual), 3, 3)
    to_universal(usual)
    pools(1).run(checkpoint_jobs.going_on_under_one_tag, config, str(usual))
    first, second = (
        pools(1).run(checkpoint_jobs.state_after_loading, engine_config(SHAMPOO, 2, 1, **UNIVERSAL), str(folder))[0]
        for folder in converted_before_and_after(usual, tmp_path)
    )
    assert not first[0]
    assert not second[0]
    assert first != second
    outcomes = []
    for point in ("_take_blocks_along", "BlockReader", "replace 0", "replace 1", "replace_text"):
        folder = shutil.copytree(usual, tmp_path / point)
        with monkeypatch.context() as patch:
            kill_conversion(patch, point, tmp_path / "after" / "global_step3_universal")
            with pytest.raises(checkpoint_jobs.Killed):
                to_universal(folder)
        loading = engine_config(SHAMPOO, 2, 1, **UNIVERSAL)
        outcomes.append(pools(1).run(checkpoint_jobs.state_after_loading, loading, str(folder))[0])
    assert all(outcome in (first, second) or outcome[0] for outcome in outcomes), outcomes
    to_universal(tmp_path / "replace 1")
    assert pools(1).run(checkpoint_jobs.state_after_loading, loading, str(tmp_path / "replace 1"))[0] == second
    assert {path.name for path in (tmp_path / "replace 1").iterdir()} == {path.name for path in usual.iterdir()}


def test_a_copy_of_the_folder_does_not_take_a_job_back(pools: Pools, tmp_path: Path) -> None:
    """What was saved since the conversion stands in the files: a copy has other times, in another order."""
    config, universal = engine_config(SHAMPOO, 2, 1), engine_config(SHAMPOO, 2, 1, **UNIVERSAL)
    folder = tmp_path / "job"
    pools(1).run(jobs.saving, config, str(folder), 3, 3)
    to_universal(folder)
    (allowed,) = pools(1).run(checkpoint_jobs.state_after_loading, universal, str(folder))
    assert allowed[1]
    pools(1).run(jobs.saving_again, universal, str(folder), 3, 5)
    copy = shutil.copytree(folder, tmp_path / "copy")
    os.utime(copy / "latest", (0, 0))
    (refused,) = pools(1).run(checkpoint_jobs.state_after_loading, universal, str(copy))
    assert "since it was converted the job has saved global_step5" in refused[0]
    with pytest.raises(CheckpointError, match="in universal form already"):
        to_universal(copy, "global_step3_universal")


@pytest.mark.parametrize("form", ["usual", "universal"])
def test_the_other_form_is_refused_by_name(pools: Pools, tmp_path: Path, form: str) -> None:
    config = engine_config(SHAMPOO, 2, 1, **(UNIVERSAL if form == "usual" else {}))
    pools(1).run(jobs.saving, engine_config(SHAMPOO, 2, 1), str(tmp_path), 3, 3)
    to_universal(tmp_path)
    tag = "global_step3" if form == "usual" else "global_step3_universal"
    (tmp_path / "latest_universal").write_text(tag)
    (tmp_path / "latest").write_text(tag)
    (result,) = pools(1).run(checkpoint_jobs.state_after_loading, config, str(tmp_path))
    assert "checkpoint.load_universal in the DeepSpeed JSON" in result[0]


def converted_before_and_after(usual: Path, tmp_path: Path) -> tuple[Path, Path]:
    after = shutil.copytree(usual, tmp_path / "after")
    to_universal(after)
    before = shutil.copytree(usual, tmp_path / "before")
    (before / "latest").unlink()  # the conversion is older than what it names
    return before, after


def kill_conversion(patch: pytest.MonkeyPatch, point: str, converted: Path) -> None:
    """Has the next conversion end at one of its steps, and leave what a kill would leave.

    Args:
        converted: what DeepSpeed's converter has made of the same checkpoint before.
    """
    name, _, number = point.partition(" ")
    calls: list[object] = []
    usual_replace = os.replace

    def convert(source: Path, target: Path, workers: int, step: int) -> None:
        shutil.copytree(converted, target, ignore=shutil.ignore_patterns("shampoo"))

    def deadly(*_: object, **__: object) -> None:
        raise checkpoint_jobs.Killed(point)

    def second_only(*arguments: Path) -> BlockReader:
        calls.append(arguments)
        return BlockReader(*arguments) if len(calls) < 2 else deadly()  # type: ignore[return-value]

    def counted(*arguments: Path) -> None:
        calls.append(arguments)
        if len(calls) - 1 == int(number):
            deadly()
        usual_replace(*arguments)

    patch.setattr(conversion, "_convert", convert)
    patch.setattr(conversion.shutil, "rmtree", lambda *_, **__: None)
    if name == "replace":
        patch.setattr(conversion.os, "replace", counted)
    elif name == "BlockReader":
        patch.setattr(conversion, name, second_only)
    else:
        patch.setattr(conversion, name, deadly)


def test_after_a_step_that_broke_saving_is_refused_by_all_and_loading_mends(pools: Pools, tmp_path: Path) -> None:
    for message, same in pools(2).run(checkpoint_jobs.broken_on_one_rank, engine_config(SHAMPOO, 2, 2), str(tmp_path)):
        assert message.startswith("rank 1: BrokenStepError: ")
        assert same
