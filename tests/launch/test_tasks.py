"""Every training program on two ranks, with each of its JSONs; runs that stop and go on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from recorder import read_metrics
from tests.launch.dlrm.test_dlrm import write_flights
from tests.launch.ranks import ROOT, launch
from tests.launch.resnet.test_resnet import write_images
from tests.launch.test_pretrain import CONFIGS, SMALL
from tests.launch.translation.test_translation import write_pairs

STEPS = 6
TRANSFORMER = ["--layers", "1", "--d-model", "32", "--heads", "2", "--vocab", "300"]
PROGRAMS = {
    "bert": ("pretrain_bert.py", [*TRANSFORMER, "--context", "32", "--autocast"], "val_accuracy"),
    "translation": ("train_translation.py", [*TRANSFORMER, "--longest", "12", "--autocast"], "val_loss"),
    "dlrm": ("train_dlrm.py", [], "val_auc"),
    "resnet": ("train_resnet.py", ["--width", "8"], "val_accuracy"),
}


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Path]:
    """Small data of every program's kind."""
    return {
        "bert": ROOT / "docs",
        "translation": write_pairs(tmp_path / "pairs"),
        "dlrm": write_flights(tmp_path / "flights"),
        "resnet": write_images(tmp_path / "images"),
    }


def small_batches(config: Path, folder: Path) -> Path:
    """The JSON with batches that suit the small data, and roots soon enough to be in force within a short run."""
    settings = json.loads(config.read_text())
    settings["train_micro_batch_size_per_gpu"] = 4
    settings["scheduler"]["params"]["warmup_num_steps"] = 2
    if settings["optimizer"]["type"] == "Shampoo":
        settings["optimizer"]["params"] |= {"root_interval": 2, "root_delay": 1}
    written = folder / config.name
    written.write_text(json.dumps(settings))
    return written


@pytest.mark.parametrize("task", PROGRAMS)
def test_every_task_trains_with_shampoo(task: str, tmp_path: Path, data: dict[str, Path]) -> None:
    program, arguments, metric = PROGRAMS[task]
    config = small_batches(CONFIGS / f"{task}_shampoo.json", tmp_path)
    arguments += ["--deepspeed_config", str(config), "--data", str(data[task]), "--runs", str(tmp_path)]
    done = launch("forks", *arguments, "--steps", STEPS, "--eval-interval", 3, program=program)
    assert done.returncode == 0, done.stdout
    records = read_metrics(tmp_path / f"{task}_shampoo")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert [record["step"] for record in records if metric in record] == [3, 6]
    assert all(math.isfinite(record["loss"]) for record in records)
    assert records[-1]["preconditioned_blocks"] == records[-1]["owned_blocks"] > 0
    assert ("final_BLEU" in records[-1]) == (task == "translation")
    assert json.loads((tmp_path / f"{task}_shampoo" / "config.json").read_text())["metric"]["key"] == metric
    assert (tmp_path / f"{task}_shampoo" / "checkpoint" / "latest").exists()


def test_missing_data_is_refused_with_the_way_to_fetch_it(tmp_path: Path) -> None:
    arguments = ["--deepspeed_config", CONFIGS / "dlrm_shampoo.json", "--data", tmp_path / "no"]
    done = launch("torchrun", *arguments, program="train_dlrm.py")
    assert done.returncode != 0
    assert "train_dlrm: error" in done.stdout
    assert "no such file or folder" in done.stdout


def test_a_run_with_muon_resumes_bit_for_bit(tmp_path: Path) -> None:
    arguments = ["--deepspeed_config", CONFIGS / "gpt_muon.json", "--runs", tmp_path, *SMALL]
    for extra in (["--name", "straight"], ["--name", "parts", "--stop-at", "5"], ["--name", "parts"]):
        done = launch("forks", *arguments, *extra)
        assert done.returncode == 0, done.stdout
    straight, parts = (
        [(record["loss"], record["lr"], record.get("val_loss")) for record in read_metrics(tmp_path / name)]
        for name in ("straight", "parts")
    )
    assert straight == parts
    assert straight[0][0] != straight[-1][0]
