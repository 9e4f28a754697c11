"""Fused matrices follow the trajectory of separate ones, at every stage, and checkpoints know how they were cut."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed import fused_jobs
from tests.distributed.jobs import SHAMPOO, engine_config
from tests.distributed.pool import WorkerPool
from tests.distributed.test_checkpoints import checksum
from tests.distributed.test_parity import FP32

Pools = Callable[[int], WorkerPool]
STEPS, SAVED_AT = 16, 8
# One block a part: where a part has several, their turns differ from those of separate parameters.
SETTINGS = {**SHAMPOO, "block_size": 16}
AS_ONE = {"fused_parts": {"*_proj.weight": 1, "*c_attn.weight": 1, "*query_key_value.weight": 1}}


def config(stage: int, ranks: int, **changed: Any) -> dict[str, Any]:
    return engine_config({**SETTINGS, **changed}, stage, ranks, size=fused_jobs.BATCH)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), (2, 0), (2, 1), (2, 2), (2, 3)])
def test_they_follow_separate_ones(pools: Pools, ranks: int, stage: int) -> None:
    expected, counted = fused_jobs.alone(SETTINGS, STEPS)
    start, _ = fused_jobs.alone(SETTINGS, 0)
    found = pools(ranks).run(fused_jobs.job, config(stage, ranks), STEPS)
    for end, _, table in found:
        assert np.linalg.norm(end - expected) <= FP32 * np.linalg.norm(expected - start)
        assert "16 x 48 (3 parts)" in table
        assert "32 x 16 (6 parts)" in table
        assert "24 x 16 (2 parts)" in table
    for key in ("preconditioned_blocks", "root_updates"):
        assert sum(metrics[key] for _, metrics, _ in found) == counted[key] > 0


def test_as_one_matrix_they_go_another_way(pools: Pools) -> None:
    expected, _ = fused_jobs.alone(SETTINGS, STEPS)
    start, _ = fused_jobs.alone(SETTINGS, 0)
    end, _, table = pools(2).run(fused_jobs.job, config(2, 2, **AS_ONE), STEPS)[0]
    assert "parts)" not in table
    assert np.linalg.norm(end - expected) > 10 * FP32 * np.linalg.norm(expected - start)


@pytest.mark.parametrize("stage", [2, 3])
def test_they_are_resumed(pools: Pools, tmp_path: Path, stage: int) -> None:
    through = pools(2).run(fused_jobs.job, config(stage, 2), STEPS, str(tmp_path), SAVED_AT)
    resumed = pools(2).run(fused_jobs.job, config(stage, 2), STEPS, str(tmp_path), SAVED_AT, True)
    for (end, _, _), (again, metrics, _) in zip(through, resumed, strict=True):
        assert np.array_equal(end, again)
        assert metrics["started"] > 0


def test_a_checkpoint_from_before_there_were_parts_starts_those_fresh(pools: Pools, tmp_path: Path) -> None:
    """What is cut now as it was then goes on: `down_proj`, and `c_attn`, which was cut between its parts by chance."""
    pools(2).run(fused_jobs.job, config(2, 2, **AS_ONE), SAVED_AT + 1, str(tmp_path), SAVED_AT)
    for message in pools(2).run(fused_jobs.refusal, config(2, 2), str(tmp_path), SAVED_AT):
        assert re.search(r"has no block (groups|gated)\..* with other patterns under 'fused_parts'", message)
    index_file = next(tmp_path.glob("*/shampoo/index.json"))
    index = json.loads(index_file.read_text())
    for each in index["header"]["cut"]:
        del each["rule"]
    index["sha256"] = checksum(index)
    index_file.write_text(json.dumps(index))
    found = pools(2).run(fused_jobs.job, config(2, 2), STEPS, str(tmp_path), SAVED_AT, True)
    assert sum(metrics["started"] for _, metrics, _ in found) == 1 + 3
    assert sum(metrics["preconditioned_blocks"] for _, metrics, _ in found) == 12


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            {"columns.*_atn.weight": 3},
            "'fused_parts' has the pattern 'columns.*_atn.weight', which matches no parameter",
        ),
        ({"columns.*": [16, 16]}, "says [16, 16] of 'columns.c_attn.weight' of shape (16, 48): they add up to 32"),
    ],
)
def test_patterns_that_do_not_fit_are_refused(pools: Pools, patterns: dict[str, Any], message: str) -> None:
    for said in pools(2).run(fused_jobs.refusal, config(3, 2, fused_parts=patterns)):
        assert message in said
