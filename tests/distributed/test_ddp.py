"""torch's DistributedDataParallel: its ranks share the blocks, and follow the single-process run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ds_shampoo import Shampoo
from tests.distributed import ddp_jobs, jobs
from tests.distributed.jobs import SHAMPOO, Trace, alone
from tests.distributed.pool import WorkerPool
from tests.distributed.test_parity import BF16, BY_ROLE, FP32, STEPS, check

Pools = Callable[[int], WorkerPool]


@pytest.fixture(scope="module")
def reference() -> Trace:
    return alone(STEPS, SHAMPOO)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_parity(pools: Pools, reference: Trace, world_size: int) -> None:
    traces = pools(world_size).run(ddp_jobs.job, STEPS, SHAMPOO)
    check(traces, reference, FP32)
    shares = [trace.extra["owned"] for trace in traces]
    everyones = [block for share in shares for block in share]
    assert len(everyones) == len(set(everyones)) == reference.metrics["owned_blocks"]
    assert max(map(len, shares)) <= 1.5 * len(everyones) / world_size
    assert all((trace.metrics["exchange_bytes"] > 0) == (world_size > 1) for trace in traces)
    assert all(trace.metrics["root_updates"] > 0 for trace in traces)
    assert all(not block.startswith("module.") for block in everyones)


def test_bf16(pools: Pools) -> None:
    """Without master weights: one rank's run is the reference."""
    expected = pools(1).run(ddp_jobs.job, STEPS, SHAMPOO, precision=torch.bfloat16)[0]
    check(pools(2).run(ddp_jobs.job, STEPS, SHAMPOO, precision=torch.bfloat16), expected, BF16)


@pytest.mark.parametrize(
    ("ddp", "accumulation"),
    [
        ({"gradient_as_bucket_view": True}, 2),
        ({"static_graph": True}, 1),  # torch's own assertion fails where its first pass is within no_sync
        ({"find_unused_parameters": True, "bucket_cap_mb": 0.001}, 2),
    ],
    ids=str,
)
def test_ways_of_reduction_accumulation_and_groups(pools: Pools, ddp: dict[str, Any], accumulation: int) -> None:
    expected = alone(STEPS, SHAMPOO, groups=jobs.decay_groups)
    traces = pools(2).run(ddp_jobs.job, STEPS, SHAMPOO, jobs.decay_groups, accumulation=accumulation, **ddp)
    check(traces, expected, FP32)


@pytest.mark.parametrize(
    "changed",
    [
        {"momentum": "after", "grafting": "rmsprop_normalized", "lr": 1e-3},
        {"exchange_dtype": "bfloat16"},
        {"preconditioner": "spectral", "direction_rms": 0.2},
        {"preconditioner": "polar", "direction_rms": 0.2},
        BY_ROLE,
    ],
    ids=lambda changed: "-".join(map(str, changed.values())),
)
def test_settings(pools: Pools, changed: dict[str, Any]) -> None:
    settings = {**SHAMPOO, **changed}
    tolerance = 1e-3 if "bfloat16" in changed.values() else FP32
    check(pools(2).run(ddp_jobs.job, STEPS, settings), alone(STEPS, settings), tolerance)


@pytest.mark.parametrize("settings", [ddp_jobs.BRANCH_SETTINGS, ddp_jobs.UNEVEN], ids=["each step", "uneven"])
def test_parameters_without_gradient_stand_still(pools: Pools, settings: dict[str, Any]) -> None:
    """As in one process: neither momentum nor weight decay moves what no rank used in a step."""
    expected, counts, _ = ddp_jobs.with_an_unused_branch(12, settings)
    for ddp in ({"find_unused_parameters": True}, {"find_unused_parameters": True, "gradient_as_bucket_view": True}):
        for found, own_counts, metrics in pools(2).run(ddp_jobs.with_an_unused_branch, 12, settings, ddp):
            assert own_counts == counts
            assert np.linalg.norm(found - expected) <= FP32 * np.linalg.norm(expected)
            assert metrics["root_updates"] > 0


def test_a_layer_is_frozen_for_a_time(pools: Pools) -> None:
    expected, counts = ddp_jobs.frozen_for_a_time(12, ddp_jobs.BRANCH_SETTINGS, shared=False)
    for found, own_counts in pools(2).run(ddp_jobs.frozen_for_a_time, 12, ddp_jobs.BRANCH_SETTINGS, shared=True):
        assert own_counts == counts
        assert np.linalg.norm(found - expected) <= FP32 * np.linalg.norm(expected)


def test_an_unfrozen_layer_that_ddp_does_not_average_is_refused(pools: Pools) -> None:
    for message in pools(2).run(ddp_jobs.unfrozen_without_a_new_wrapper, ddp_jobs.BRANCH_SETTINGS):
        assert message.startswith("parameter 'branch.weight' has other gradients on some ranks")


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_gradients_that_ddp_does_not_average_are_refused_at_the_first_step(pools: Pools, before: bool) -> None:
    for message in pools(2).run(ddp_jobs.unfrozen_unseen, ddp_jobs.BRANCH_SETTINGS, before):
        assert message.startswith("parameter 'branch.weight' has other gradients on some ranks")


def test_a_wrapper_within_a_module(pools: Pools) -> None:
    (first, owned, names), (second, others, _) = pools(2).run(ddp_jobs.nested, 6, ddp_jobs.BRANCH_SETTINGS)
    assert np.array_equal(first, second)
    assert names == [f"net.{layer}.{kind}" for layer in ("trunk", "branch", "last") for kind in ("weight", "bias")]
    assert owned
    assert others
    assert {block.split("[")[0] for block in owned + others} == {"net.branch.weight", "net.last.weight"}


def test_process_groups_and_two_optimizers(pools: Pools) -> None:
    reference = alone(8, SHAMPOO)
    for found in pools(4).run(ddp_jobs.in_pairs, 8, SHAMPOO):
        for end in found:
            assert np.linalg.norm(end - reference.end) <= FP32 * np.linalg.norm(reference.end - reference.start)


def test_closures(pools: Pools) -> None:
    reference = alone(6, SHAMPOO)
    (first, losses), (second, others) = pools(2).run(ddp_jobs.closures, 6, SHAMPOO)
    assert np.array_equal(first, second)
    assert np.linalg.norm(first - reference.end) <= FP32 * np.linalg.norm(reference.end - reference.start)
    assert np.mean([losses, others], axis=0) == pytest.approx(reference.losses, rel=FP32)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("values", "RuntimeError: parameter 'weight' has other values on some ranks"),
        ("settings", "SettingsError: 'lr' of param group 0 is 0.01 on rank 0 of the .*, but 0.02 on rank 1"),
        ("job-wide", "SettingsError: Shampoo setting 'exchange_dtype' is 'float32' on rank 0 .*, but 'bfloat16'"),
        ("threads", ""),
        ("groups", "SettingsError: parameter 'bias' is .* in param group 0' on rank 0 .*, but .* in param group 1'"),
        ("parameters", "SettingsError: parameter 'bias' is .* on rank 0 .*, but 'not there' on rank 1"),
        ("outside", "SettingsError: on some ranks all trained parameters are of the DistributedDataParallel module"),
        ("later", "SettingsError: parameter 'param_2' is not of the DistributedDataParallel module"),
        ("join", r"RuntimeError: Shampoo can't step within DistributedDataParallel.join\(\)"),
    ],
)
def test_what_is_refused(pools: Pools, kind: str, said: str) -> None:
    """On all ranks alike: none is left waiting."""
    for message in pools(2).run(ddp_jobs.refused, kind):
        assert re.match(said, message) if said else not message


# ---------------------------------------------------------------- state


def test_a_job_goes_on_bit_for_bit(pools: Pools, tmp_path: Path) -> None:
    path = str(tmp_path / "saved.pt")
    through = pools(2).run(ddp_jobs.saved, path, 7, SHAMPOO)
    state = torch.load(path, weights_only=True)["optimizer"]["state"]
    assert any(block["pending"]["due_at"] for entry in state.values() for block in entry.get("blocks", {}).values())
    for (trace, equal), straight in zip(pools(2).run(ddp_jobs.resumed, path, 7, 7, SHAMPOO), through, strict=True):
        assert equal
        assert np.array_equal(trace.end, straight.end)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 4)])
def test_another_number_of_ranks(pools: Pools, tmp_path: Path, before: int, after: int) -> None:
    path = str(tmp_path / "saved.pt")
    straight = pools(before).run(ddp_jobs.saved, path, 7, SHAMPOO, to=None)[0]
    for trace, equal in pools(after).run(ddp_jobs.resumed, path, 7, 7, SHAMPOO):
        assert equal
        moved = np.linalg.norm(straight.end - straight.start)
        assert np.linalg.norm(trace.end - straight.end) <= FP32 * moved


def test_a_process_without_ddp_takes_the_state(pools: Pools, tmp_path: Path) -> None:
    path = str(tmp_path / "saved.pt")
    straight = pools(2).run(ddp_jobs.saved, path, 7, SHAMPOO)[0]
    saved = torch.load(path, weights_only=True)
    model = jobs.build_model()
    optimizer = Shampoo(model.parameters(), model=model, **SHAMPOO)
    optimizer.consolidate_state_dict()
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert ddp_jobs.same(optimizer.state_dict(), saved["optimizer"])
    for step in range(7, 14):
        optimizer.zero_grad()
        ddp_jobs.mean_loss(model, step, 0, 1).backward()
        optimizer.step()
    assert np.linalg.norm(jobs.flat(model) - straight.end) <= FP32 * np.linalg.norm(straight.end - straight.start)


def test_a_state_needs_all_blocks_as_they_are(pools: Pools) -> None:
    for rank, said in enumerate(pools(2).run(ddp_jobs.refused_states, SHAMPOO)):
        missing = [bool(line) for line in said]
        assert missing == [True, False, True, rank != 1, True, False, False]
        assert all("call consolidate_state_dict() on all ranks first" in line for line in said if line)


def test_a_state_that_one_rank_refuses_is_refused_by_all(pools: Pools) -> None:
    (first, untouched), (second, also) = pools(2).run(ddp_jobs.refused_on_one_rank, SHAMPOO)
    assert untouched
    assert also
    assert "lacks the factors of" in second
    assert first.startswith("rank 1 of the DistributedDataParallel module refused: SettingsError: the checkpoint lacks")


@pytest.mark.parametrize("way", ["sharded", "full", "from rank 0"])
def test_torchs_checkpoints(pools: Pools, tmp_path: Path, way: str) -> None:
    assert pools(2).run(ddp_jobs.through_torchs_checkpoint, str(tmp_path / "folder"), SHAMPOO, way) == [True, True]


def test_a_state_that_only_one_rank_has_is_refused(pools: Pools) -> None:
    """As torch's `full_state_dict` with `cpu_offload` gives it to the first rank, and an empty one to the others."""
    for message in pools(2).run(ddp_jobs.loaded_on_one_rank, SHAMPOO):
        assert "the step count of parameter 0 in the state is 3 on rank 0" in message
