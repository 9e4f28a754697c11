"""The presets for GPUs: their JSON parses, and blocks and owners come out, on a model without memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ds_shampoo.config import parse
from megatron_presets import PRESETS, RATE_OVER_ADAMW, Preset, write

pytest.importorskip("megatron.core")

ROOT = Path(__file__).resolve().parents[2]
WORLD = 64


@pytest.mark.parametrize("name", PRESETS)
def test_the_json_is_what_shampoo_takes(name: str) -> None:
    config = json.loads((ROOT / PRESETS[name].config).read_text())
    assert config["optimizer"]["type"] == "Shampoo"
    parse(config["optimizer"]["params"])


def test_the_json_is_what_the_preset_says(tmp_path: Path) -> None:
    write(tmp_path)
    for preset in PRESETS.values():
        written = (tmp_path / Path(preset.config).name).read_text()
        assert (ROOT / preset.config).read_text() == written, "run `python launch/megatron_presets.py --write`"


@pytest.mark.parametrize("name", PRESETS)
def test_one_number_sets_all_rates(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = PRESETS[name]
    before = preset.settings()["optimizer"]["params"]["lr"]
    assert before == pytest.approx(RATE_OVER_ADAMW * preset.adamw_lr, rel=1e-6)
    monkeypatch.setattr("megatron_presets.RATE_OVER_ADAMW", 2 * RATE_OVER_ADAMW)
    assert preset.settings()["optimizer"]["params"]["lr"] == pytest.approx(2 * before, rel=1e-6)


@pytest.mark.parametrize(("name", "tokens"), [("1.3b", 2**20), ("6.7b", 2**21), ("13b", 2**21), ("70b", 2**22)])
def test_batch_and_schedule_are_those_of_64_gpus(name: str, tokens: int) -> None:
    preset = PRESETS[name]
    config = json.loads((ROOT / preset.config).read_text())
    copies = WORLD // preset.tensor_model_parallel_size
    sequences = copies * config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"]
    assert sequences * preset.seq_length == tokens
    assert f"--train-iters {config['scheduler']['params']['total_num_steps']}" in preset.flags()


@pytest.fixture(scope="module")
def on_64_ranks() -> dict[str, dict[str, float]]:
    """What `owned` says of each preset, from a process of its own, where 64 ranks are made believe."""
    program = "from tests.megatron_models.test_presets import look; look()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "launch")])}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", PRESETS)
def test_blocks_and_owners_on_64_ranks(on_64_ranks: dict[str, dict[str, float]], name: str) -> None:
    found, preset = on_64_ranks[name], PRESETS[name]
    width, slices = preset.hidden_size, preset.tensor_model_parallel_size
    assert found["ranks"] == WORLD // slices
    # Every element of the layers' matrices that this slice has is in one block: GPT-3's are twelve squares of the
    # width; Llama 2's have 64 heads of queries, 8 of keys and 8 of values, and three matrices of a gated half.
    layer = width * (2 * width + 2 * width // 8 + 3 * 28672) if name == "70b" else 12 * width**2
    assert found["elements"] == layer * preset.num_layers // slices
    assert found["largest"] <= 1024
    tables = 2 if name == "70b" else 1  # the word embedding, and an output layer that isn't tied to it
    assert found["sliced"] == 4 * preset.num_layers + tables
    assert found["load"] <= max(1.05, found["bound"])


def look() -> None:
    """Prints what a data-parallel group of each preset's first slice owns."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from ds_shampoo.testing import megatron_on_cpu as cpu

    cpu.stand_in()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)  # type: ignore[no-untyped-call]
    print(json.dumps({name: look_at(preset) for name, preset in PRESETS.items()}))


def look_at(preset: Preset) -> dict[str, float]:
    """Of the model that the program would make of the preset's flags."""
    import torch
    from megatron.core import parallel_state

    from ds_shampoo.megatron import mpu
    from megatron_arguments import parse_arguments
    from megatron_job import settings_of
    from pretrain_gpt_megatron import build_model

    os.environ["RANK"] = "0"
    flags = [part for flag in preset.flags() for part in flag.split()]
    sys.argv = ["pretrain_gpt_megatron.py", *flags, "--deepspeed_config", preset.config, "--data-path", "none"]
    arguments = parse_arguments("")
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=preset.tensor_model_parallel_size, create_gloo_process_groups=False
    )
    config = settings_of(arguments)
    config.perform_initialization = False
    with torch.device("meta"):
        model = build_model(arguments, config, 50304)
    settings = parse(json.loads((ROOT / preset.config).read_text())["optimizer"]["params"])
    return owned(model, settings, mpu.get_data_parallel_world_size(), mpu)


def owned(model: Any, settings: Any, ranks: int, mpu: Any) -> dict[str, float]:
    """Blocks of the model over `ranks` equal flat shares, as ZeRO-1 makes them."""
    from ds_shampoo.algorithm import cost, selection
    from ds_shampoo.config import GroupSettings
    from ds_shampoo.sharding.fragments import Fragment
    from ds_shampoo.sharding.ownership import load_bound
    from ds_shampoo.sharding.partition import LogicalParameter, Partition
    from ds_shampoo.sharding.table import block_table

    roles = selection.roles(model)
    parameters = [
        LogicalParameter(name, p, tuple(p.shape), roles[id(p)], False, mpu.shampoo_sections(model, name, p))
        for name, p in model.named_parameters()
    ]
    share = -(-sum(parameter.tensor.numel() for parameter in parameters) // ranks)
    fragments, at = [], 0
    for parameter in parameters:
        end = at + parameter.tensor.numel()
        for rank in range(at // share, (end - 1) // share + 1):
            start, stop = max(at, rank * share), min(end, (rank + 1) * share)
            fragments.append(Fragment(parameter.name, start - at, stop - start, rank, 0, start - rank * share))
        at = end
    group = GroupSettings(**{key: getattr(settings, key) for key in GroupSettings.model_fields})
    table = block_table(parameters, Partition(fragments, 0, ranks), group, [0.0] * ranks)
    intervals = group.statistics_interval, group.root_interval
    costs = [cost.step_flops(block, *intervals, group.preconditioner) for block in table.blocks]
    loads = [0.0] * ranks
    for owner, each in zip(table.owners, costs, strict=True):
        loads[owner] += each
    mean = sum(loads) / ranks
    return {
        "ranks": ranks,
        "sliced": sum(parameter.sections is not None for parameter in parameters),
        "elements": sum(block.numel for block in table.blocks),
        "largest": max(max(block.shape) for block in table.blocks),
        "load": max(loads) / mean,
        "bound": load_bound(costs, [0.0] * ranks) / mean * (1 + 1e-9),
    }
