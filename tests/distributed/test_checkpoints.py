"""Checkpoints: the same world bit for bit, another world through the universal form, and what is wrong with a file."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from ds_shampoo.frameworks.deepspeed.universal import to_universal
from ds_shampoo.state.files import CheckpointError
from tests.distributed import jobs
from tests.distributed.jobs import SHAMPOO, Trace, engine_config
from tests.distributed.pool import WorkerPool
from tests.distributed.test_parity import BY_ROLE, FP32

Pools = Callable[[int], WorkerPool]
SAVE_AT, STEPS = 8, 16

# With all of the state that there may be.
OTHERS = {**BY_ROLE, "preconditioner": "polar", "statistics_of": "differences"}
ADAMW = {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.01, "torch_adam": True}}


def blocks_folder(folder: Path) -> Path:
    return folder / (folder / "latest").read_text() / "shampoo"


def checksum(index: dict[str, Any]) -> str:
    """What an index has to say of the rest of it."""
    rest = {key: value for key, value in index.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def apart(run: Trace, reference: Trace) -> float:
    """How far a run ends from another, relative to how far that one moved after the save."""
    return float(np.linalg.norm(run.end - reference.end) / np.linalg.norm(reference.end - run.start))


@pytest.fixture(scope="module")
def saved(pools: Pools, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trace]:
    """A checkpoint of two ranks at stage 2, and the run that went on from it."""
    folder = tmp_path_factory.mktemp("stage2")
    traces = pools(2).run(jobs.saving, engine_config(SHAMPOO, 2, 2), str(folder), SAVE_AT, STEPS)
    return folder, traces[0]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("own", [{}, OTHERS], ids=["usual", "others"])
def test_the_same_world_resumes_bit_for_bit(pools: Pools, tmp_path: Path, stage: int, own: dict[str, Any]) -> None:
    config = engine_config({**SHAMPOO, **own}, stage, 2)
    straight = pools(2).run(jobs.saving, config, str(tmp_path), SAVE_AT, STEPS)
    resumed = pools(2).run(jobs.loading, config, str(tmp_path), SAVE_AT, STEPS)
    for before, after in zip(straight, resumed, strict=True):
        assert before.losses == after.losses
        assert np.array_equal(before.end, after.end)
    assert sum(trace.extra["in_force"] for trace in resumed) > 0


# Divisible by 1, 2, 3 and 4 ranks.
BATCH = 12


@pytest.fixture(scope="module")
def universal(pools: Pools, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, Trace]]:
    """By stage, a checkpoint of two ranks and three param groups in universal form, and the run that went on."""
    made = {}
    for stage in (2, 3):
        folder = tmp_path_factory.mktemp(f"stage{stage}")
        config = engine_config(SHAMPOO, stage, 2, size=BATCH)
        trace = pools(2).run(jobs.saving, config, str(folder), SAVE_AT, STEPS, jobs.decay_groups)[0]
        assert to_universal(folder).name == f"global_step{SAVE_AT}_universal"
        made[stage] = folder, trace
    return made


UNIVERSAL = {"checkpoint": {"load_universal": True}}


@pytest.mark.parametrize("saved_at", [2, 3])
@pytest.mark.parametrize(("world_size", "stage"), [(1, 1), (1, 3), (2, 1), (2, 3), (3, 2), (3, 3), (4, 2), (4, 3)])
def test_another_world_goes_on_where_the_run_was(
    pools: Pools, universal: dict[int, tuple[Path, Trace]], saved_at: int, world_size: int, stage: int
) -> None:
    folder, straight = universal[saved_at]
    config = engine_config(SHAMPOO, stage, world_size, size=BATCH, **UNIVERSAL)
    for trace in pools(world_size).run(jobs.loading, config, str(folder), SAVE_AT, STEPS, jobs.decay_groups):
        assert apart(trace, straight) <= FP32
        assert trace.losses == pytest.approx(straight.losses, rel=FP32)


def test_settings_by_role_go_on_in_another_world(pools: Pools, tmp_path: Path) -> None:
    """The universal loader replaces param groups' settings; each role's stay the JSON's."""
    settings = {**SHAMPOO, **BY_ROLE}
    config = engine_config(settings, 2, 2, size=BATCH)
    straight = pools(2).run(jobs.saving, config, str(tmp_path), SAVE_AT, STEPS, jobs.role_groups)[0]
    to_universal(tmp_path)
    for world_size, stage in ((1, 1), (3, 3), (4, 2)):
        config = engine_config(settings, stage, world_size, size=BATCH, **UNIVERSAL)
        for trace in pools(world_size).run(jobs.loading, config, str(tmp_path), SAVE_AT, STEPS, jobs.role_groups):
            assert apart(trace, straight) <= FP32


@pytest.mark.parametrize("stage", [2, 3])
def test_another_precision_goes_on_from_the_same_weights_and_roots(
    pools: Pools, universal: dict[int, tuple[Path, Trace]], stage: int
) -> None:
    folder, straight = universal[2]
    config = engine_config(SHAMPOO, stage, 4, size=BATCH, precision="bf16", **UNIVERSAL)
    traces = pools(4).run(jobs.loading, config, str(folder), SAVE_AT, STEPS, jobs.decay_groups)
    assert sum(trace.extra["in_force"] for trace in traces) > 0
    assert traces[0].losses == pytest.approx(straight.losses, rel=0.02)


def test_a_universal_checkpoint_does_not_take_a_job_back(
    pools: Pools, universal: dict[int, tuple[Path, Trace]], tmp_path: Path
) -> None:
    folder = shutil.copytree(universal[2][0], tmp_path / "job")
    config = engine_config(SHAMPOO, 2, 1, size=BATCH, **UNIVERSAL)
    pools(1).run(jobs.saving_again, config, str(folder), SAVE_AT, SAVE_AT + 2, jobs.decay_groups)
    ((message, untouched),) = pools(1).run(jobs.failing_to_load, config, str(folder), jobs.decay_groups)
    assert f"names global_step{SAVE_AT}_universal, but since it was converted" in message
    assert f"the job has saved global_step{SAVE_AT + 2}" in message
    assert "take load_universal out of the JSON" in message
    assert untouched
    config = engine_config(SHAMPOO, 2, 1, size=BATCH)
    pools(1).run(jobs.loading, config, str(folder), SAVE_AT + 2, STEPS, jobs.decay_groups)


def test_stage_0_loads_on_any_number_of_ranks(pools: Pools, tmp_path: Path) -> None:
    config = engine_config(SHAMPOO, 0, 2, size=BATCH)
    straight = pools(2).run(jobs.saving, config, str(tmp_path), SAVE_AT, STEPS)[0]
    for world_size in (1, 3, 4):
        config = engine_config(SHAMPOO, 0, world_size, size=BATCH)
        for trace in pools(world_size).run(jobs.loading, config, str(tmp_path), SAVE_AT, STEPS):
            assert apart(trace, straight) <= FP32
    with pytest.raises(CheckpointError, match="any number of ranks loads it at stage 0 as it is"):
        to_universal(tmp_path)


@pytest.mark.parametrize(
    ("world_size", "stage", "named"), [(4, 2, "2 ranks saved this, but 4"), (2, 3, "DeepSpeedZeroOptimizer_Stage3")]
)
def test_another_world_is_refused_without_the_universal_form(
    pools: Pools, saved: tuple[Path, Trace], world_size: int, stage: int, named: str
) -> None:
    config = engine_config(SHAMPOO, stage, world_size)
    for message, untouched in pools(world_size).run(jobs.failing_to_load, config, str(saved[0])):
        assert named in message
        assert "ds-shampoo to-universal" in message
        assert untouched


def test_the_comparison_notices_lost_roots(pools: Pools, saved: tuple[Path, Trace]) -> None:
    """Without optimizer states the run goes elsewhere, so that agreement means that they were restored."""
    folder, straight = saved
    config = engine_config(SHAMPOO, 2, 2)
    trace = pools(2).run(jobs.loading, config, str(folder), SAVE_AT, STEPS, load_optimizer_states=False)[0]
    assert trace.extra["in_force"] == 0
    assert apart(trace, straight) > 100 * FP32


@pytest.mark.parametrize(
    ("changed", "kept"),
    [
        ({"root_interval": 7, "root_threads": 2}, True),
        ({"root_dtype": "bfloat16"}, True),
        ({"statistics_of": "differences"}, True),
        ({"block_size": 40}, False),
    ],
    ids=["interval", "root_dtype", "statistics_of", "block_size"],
)
def test_changed_settings(pools: Pools, saved: tuple[Path, Trace], changed: dict[str, Any], kept: bool) -> None:
    folder, _ = saved
    traces = pools(2).run(jobs.loading, engine_config({**SHAMPOO, **changed}, 2, 2), str(folder), SAVE_AT, STEPS)
    assert (sum(trace.extra["in_force"] for trace in traces) > 0) == kept
    assert all(np.isfinite(trace.losses).all() for trace in traces)


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "index", "model", "folder"])
def test_a_damaged_checkpoint_is_refused_before_anything_is_touched(
    pools: Pools, saved: tuple[Path, Trace], tmp_path: Path, damage: str
) -> None:
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    folder = blocks_folder(tmp_path)
    file = sorted(folder.glob("rank00001-*.safetensors"))[0]
    named = [file.name, "block layers."]
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "flipped":
        content = bytearray(file.read_bytes())
        content[-1000] ^= 4
        file.write_bytes(bytes(content))
    elif damage == "folder":
        shutil.rmtree(folder)
        named = [str(folder.parent), "its folder shampoo/ is missing"]
    elif damage == "index":
        (folder / "index.json").write_text("{")
        named = ["index.json"]
    else:
        index = json.loads((folder / "index.json").read_text())
        for entry in index["files"]:
            entry["blocks"] = {name.replace("layers.1", "layers.9"): b for name, b in entry["blocks"].items()}
        index["sha256"] = checksum(index)
        (folder / "index.json").write_text(json.dumps(index))
        named = ["has no block layers.1", "another model"]
    for message, untouched in pools(2).run(jobs.failing_to_load, engine_config(SHAMPOO, 2, 2), str(tmp_path)):
        assert all(part in message for part in named), message
        assert untouched


def test_from_adamw_and_back(pools: Pools, tmp_path: Path) -> None:
    shampoo = engine_config(SHAMPOO, 2, 2)
    adamw = {**shampoo, "optimizer": ADAMW, "zero_allow_untested_optimizer": True}
    pools(2).run(jobs.plain_saving, adamw, str(tmp_path / "adamw"), 4)
    traces = pools(2).run(jobs.loading, shampoo, str(tmp_path / "adamw"), 4, STEPS)
    assert all(trace.extra["in_force"] == 0 for trace in traces)
    assert traces[0].losses[-1] < traces[0].losses[0]
    assert traces[0].metrics["preconditioned_blocks"] > 0
    pools(2).run(jobs.saving_again, shampoo, str(tmp_path / "adamw"), 4, 12)
    assert pools(2).run(jobs.loading, shampoo, str(tmp_path / "adamw"), 12, STEPS)[0].extra["in_force"] > 0
    pools(2).run(jobs.saving, shampoo, str(tmp_path / "shampoo"), 4, 4)
    losses = pools(2).run(jobs.plain_loading, adamw, str(tmp_path / "shampoo"), 4, STEPS)[0]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("stage", [2, 3])
def test_a_group_without_parameters_changes_nothing(pools: Pools, tmp_path: Path, stage: int) -> None:
    config = engine_config(SHAMPOO, stage, 2)
    straight = pools(2).run(jobs.saving, config, str(tmp_path), SAVE_AT, STEPS, jobs.an_empty_group_first)
    resumed = pools(2).run(jobs.loading, config, str(tmp_path), SAVE_AT, STEPS, jobs.an_empty_group_first)
    for before, after in zip(straight, resumed, strict=True):
        assert np.array_equal(before.end, after.end)
    assert sum(trace.extra["in_force"] for trace in resumed) > 0
    index = json.loads((blocks_folder(tmp_path) / "index.json").read_text())
    assert sum(len(entry["blocks"]) for entry in index["files"]) > 0


def test_a_rank_that_can_not_write_stops_all_and_the_former_checkpoint_stays(
    pools: Pools, saved: tuple[Path, Trace], tmp_path: Path
) -> None:
    folder, straight = shutil.copytree(saved[0], tmp_path / "job"), saved[1]
    config = engine_config(SHAMPOO, 2, 2)
    for message in pools(2).run(jobs.failing_to_save, config, str(folder), f"global_step{SAVE_AT}"):
        assert message.startswith("rank 1: ")
        assert "File too large" in message
    resumed = pools(2).run(jobs.loading, config, str(folder), SAVE_AT, STEPS)[0]
    assert np.array_equal(resumed.end, straight.end)


def test_between_micro_batches_saving_is_refused(pools: Pools, tmp_path: Path) -> None:
    for message in pools(2).run(jobs.saving_between_micro_batches, engine_config(SHAMPOO, 2, 2, 2), str(tmp_path)):
        assert message.startswith("rank 0: save_checkpoint between micro-batches")


def test_no_pickle_in_what_is_written(saved: tuple[Path, Trace]) -> None:
    folder, _ = saved
    assert {path.suffix for path in blocks_folder(folder).iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeeds_own_script_reads_the_weights(pools: Pools, tmp_path: Path, stage: int) -> None:
    traces = pools(2).run(jobs.saving, engine_config(SHAMPOO, stage, 2), str(tmp_path), 4, 4)
    weights = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path))
    found = np.concatenate(
        [weights[name].detach().numpy().ravel() for name, _ in jobs.build_model().named_parameters()]
    )
    assert np.array_equal(found, traces[0].end)
