"""A run's folder over stops and resumes: records cut back to the resumed step, and no other run resumed."""

from __future__ import annotations

import time
from pathlib import Path
from threading import Thread

import pytest

from clock import Spent, StepClock
from recorder import Recorder, read_metrics
from run_folder import RunError, RunFolder


def test_a_resume_drops_what_it_will_repeat_and_goes_on_counting_seconds(tmp_path: Path) -> None:
    first = Recorder(tmp_path, 0)
    for step in range(1, 6):
        first.write({"step": step}, Spent(wall=2.0, processor=3.0))
    Recorder(tmp_path, 3).write({"step": 4}, Spent(wall=5.0, processor=4.0))
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert [record["seconds"] for record in records] == [2.0, 4.0, 6.0, 11.0]
    assert [record["processor_seconds"] for record in records] == [3.0, 6.0, 9.0, 13.0]


def test_the_clock_leaves_out_what_its_thread_does_between_steps_but_no_other_thread_s_work() -> None:
    def work(seconds: float) -> None:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    clock = StepClock()
    work(0.3)
    clock.start()
    work(0.1)
    assert 0.1 <= clock.spent().processor < 0.3
    other = Thread(target=work, args=(0.3,))
    other.start()
    work(0.3)
    other.join()
    clock.start()
    assert 0.3 <= clock.spent().processor < 0.6


def test_a_new_start_drops_everything(tmp_path: Path) -> None:
    Recorder(tmp_path, 0).write({"step": 1}, Spent(wall=1.0, processor=1.0))
    Recorder(tmp_path, 0)
    assert read_metrics(tmp_path) == []


CONFIG = {
    "steps": 10,
    "seed": 0,
    "data": {"source": "a.txt", "training_bytes": 100},
    "deepspeed": {"optimizer": {"params": {"lr": 1e-3}}, "tensorboard": {"output_path": "runs/a"}},
}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.prepare(CONFIG)
    return folder


def test_length_and_file_names_may_change(folder: RunFolder) -> None:
    moved = CONFIG | {"steps": 20, "data": {"source": "b.txt", "training_bytes": 100}}
    moved["deepspeed"] = {"optimizer": {"params": {"lr": 1e-3}}, "tensorboard": {"output_path": "runs/b"}}
    folder.check_resumable(moved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed = 0, this call has 1"),
        ({"deepspeed": {"optimizer": {"params": {"lr": 2e-3}}}}, "optimizer.params.lr = 0.001, this call has 0.002"),
    ],
)
def test_another_run_is_not_resumed(folder: RunFolder, change: dict[str, object], message: str) -> None:
    with pytest.raises(RunError, match=message):
        folder.check_resumable(CONFIG | change)


MODEL = {"layers": 4, "vocab": 256}
NAMED = {"architecture": "gpt2", "mlp": "gated"}
TOKENS = {"source": "a.txt", "training_bytes": 100, "tokenizer": "bytes"}


def test_a_run_older_than_a_setting_goes_on_as_what_it_was(folder: RunFolder) -> None:
    folder.prepare(CONFIG | {"model": MODEL})
    folder.check_resumable(CONFIG | {"model": MODEL | NAMED, "data": TOKENS})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": MODEL | NAMED | {"architecture": "modern"}}, "architecture = 'gpt2', this call has 'modern'"),
        ({"model": MODEL | NAMED | {"mlp": "squared_relu"}}, "mlp = 'gated', this call has 'squared_relu'"),
        ({"data": TOKENS | {"tokenizer": "BPE of 300"}}, "tokenizer = 'bytes', this call has 'BPE of 300'"),
    ],
)
@pytest.mark.parametrize("old", [True, False])
def test_another_model_or_tokenizer_is_not_resumed(
    folder: RunFolder, change: dict[str, object], message: str, old: bool
) -> None:
    folder.prepare(CONFIG | ({"model": MODEL} if old else {"model": MODEL | NAMED, "data": TOKENS}))
    with pytest.raises(RunError, match=message):
        folder.check_resumable(CONFIG | {"model": MODEL | NAMED, "data": TOKENS} | change)


def test_without_a_checkpoint_nothing_is_saved(folder: RunFolder) -> None:
    assert folder.saved_step() == 0
