"""The Megatron programs, once each through the real launcher: indexed data, real models, tensor parallelism, resume."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_presets import LLAMA
from recorder import read_metrics
from tests.launch import ranks as ranks_of
from tests.launch.ranks import ROOT

pytest.importorskip("megatron.core")

TEXT = "\n\n".join(
    f"The {number}th of these stories is short. Somebody went to town number {number % 7}, and came back late! "
    f"Was it raining then? Nobody knows; it was {number * 37 % 101} days before the harvest."
    for number in range(1500)
)
SIZE = [
    "--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4", "--seq-length", "32",
    "--eval-interval", "6", "--eval-iters", "2", "--save-interval", "3",
]  # fmt: skip


def launch(kind: str, ranks: int, *arguments: str, launcher: str = "forks") -> subprocess.CompletedProcess[str]:
    return ranks_of.launch(launcher, "--deepspeed", *arguments, program=f"pretrain_{kind}_megatron.py", ranks=ranks)


@pytest.fixture(scope="module", params=["gpt", "bert"])
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "text.txt").write_text(TEXT)
    prefix = folder / "stories"
    done = subprocess.run(
        [sys.executable, "launch/prepare_data.py", "--model", request.param, "--input", str(folder / "text.txt"),
         "--output-prefix", str(prefix), "--vocab-size", "512"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "documents" in done.stdout
    return request.param, prefix


def train(
    data: tuple[str, Path],
    ranks: int,
    slices: int,
    steps: int,
    config: Path,
    save: Path,
    stages: int = 1,
    more: Sequence[str] = (),
    launcher: str = "forks",
) -> list[dict[str, Any]]:
    kind, prefix = data
    shape = [*(["--swiglu"] if kind == "gpt" else []), *more]
    sequence = ["--sequence-parallel"] if kind == "gpt" and slices > 1 else []
    done = launch(
        kind, ranks, "--deepspeed_config", str(config), "--data-path", str(prefix), "--tensor-model-parallel-size",
        str(slices), "--pipeline-model-parallel-size", str(stages), "--train-iters", str(steps), "--save", str(save),
        *SIZE, *shape, *sequence, launcher=launcher,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert "validation loss" in done.stdout
    return read_metrics(save)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    settings = json.loads((ROOT / "configs" / "gpt_megatron_shampoo.json").read_text())
    settings["optimizer"]["params"] |= {"block_size": 16, "root_interval": 3, "matrix_epsilon": 1e-3}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings))
    return path


def test_one_trajectory_at_tp_1_and_2_and_over_a_resume(data: tuple[str, Path], config: Path, tmp_path: Path) -> None:
    whole = train(data, 2, 1, 6, config, tmp_path / "whole", launcher="deepspeed")
    train(data, 4, 2, 3, config, tmp_path / "sliced")
    sliced = train(data, 4, 2, 6, config, tmp_path / "sliced")
    assert [record["step"] for record in sliced] == [1, 2, 3, 4, 5, 6]
    assert [r["loss"] for r in sliced] == pytest.approx([r["loss"] for r in whole], rel=1e-4)
    assert sliced[-1]["val_loss"] == pytest.approx(whole[-1]["val_loss"], rel=1e-4)
    assert sliced[-1]["preconditioned_blocks"] > 0


def test_the_layers_of_the_largest_preset(data: tuple[str, Path], config: Path, tmp_path: Path) -> None:
    if data[0] == "bert":
        pytest.skip("the preset is a GPT")
    layers = [word for flag in LLAMA for word in flag.split()]
    layers += ["--num-query-groups", "2", "--ffn-hidden-size", "96"]
    whole = train(data, 1, 1, 6, config, tmp_path / "whole", more=layers)
    sliced = train(data, 2, 2, 6, config, tmp_path / "sliced", more=layers)
    assert [r["loss"] for r in sliced] == pytest.approx([r["loss"] for r in whole], rel=1e-4)
    assert sliced[-1]["loss"] < sliced[0]["loss"]
    assert sliced[-1]["preconditioned_blocks"] > 0


def test_pipeline_stages(data: tuple[str, Path], config: Path, tmp_path: Path) -> None:
    kind, prefix = data
    if kind == "bert":
        done = launch(
            kind, 2, "--deepspeed_config", str(config), "--data-path", str(prefix), "--pipeline-model-parallel-size",
            "2", *SIZE,
        )  # fmt: skip
        assert done.returncode != 0
        assert "--pipeline-model-parallel-size 2: pretrain_bert_megatron runs in one stage only" in done.stdout
        return
    whole = train(data, 2, 1, 6, config, tmp_path / "whole", stages=2)
    train(data, 4, 2, 3, config, tmp_path / "sliced", stages=2)
    sliced = train(data, 4, 2, 6, config, tmp_path / "sliced", stages=2)
    assert [record["step"] for record in sliced] == [1, 2, 3, 4, 5, 6]
    assert [r["loss"] for r in sliced] == pytest.approx([r["loss"] for r in whole], rel=1e-4)
    assert sliced[-1]["val_loss"] == pytest.approx(whole[-1]["val_loss"], rel=1e-4)
    assert sliced[-1]["loss"] < sliced[0]["loss"]
    assert sliced[-1]["preconditioned_blocks"] > 0


def test_a_wrong_size_is_refused(data: tuple[str, Path], config: Path) -> None:
    kind, prefix = data
    done = launch(
        kind, 2, "--deepspeed_config", str(config), "--data-path", str(prefix), "--tensor-model-parallel-size", "3",
        "--hidden-size", "48", "--num-attention-heads", "6", launcher="deepspeed",
    )  # fmt: skip
    assert done.returncode != 0
    assert "--tensor-model-parallel-size 3 must divide the 2 ranks" in done.stdout
