"""The folder of one run: its effective configuration, what may resume it, and its checkpoints."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import deepspeed.comm as dist
from deepspeed import DeepSpeedEngine

# Where a resumed run's config.json may differ: in the run's length and in the names of files.
FREE_KEYS = ("steps", "deepspeed.scheduler.params.total_num_steps", "deepspeed.tensorboard", "data.source")

# What a run had of a setting that its config.json doesn't name, being older than the setting.
BEFORE = {"model.architecture": "gpt2", "model.mlp": "gated", "data.tokenizer": "bytes"}


class RunError(ValueError):
    """A run that can't be resumed as asked."""


class RunFolder:
    """`runs/<name>/`, as rank 0 writes it and every rank reads it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensorboard = path / "tensorboard"
        self._config = path / "config.json"
        self._checkpoints = path / "checkpoint"
        self._latest = self._checkpoints / "latest"

    def saved_step(self) -> int:
        """The step of the newest complete checkpoint, 0 where there is none."""
        return _step(self._latest.read_text()) if self._latest.exists() else 0

    def check_resumable(self, config: Mapping[str, Any]) -> None:
        """Raises RunError where a checkpoint was made with a configuration that `config` doesn't continue."""
        saved, wanted = (dict(_flatten(c)) for c in (json.loads(self._config.read_text()), config))
        for key in sorted(saved.keys() | wanted.keys()):
            before, now = saved.get(key, BEFORE.get(key)), wanted.get(key)
            if before != now and not key.startswith(FREE_KEYS):
                raise RunError(
                    f"{self.path} was made with {key} = {before!r}, this call has {now!r}; "
                    "give this run another --name, or remove the old one"
                )

    def prepare(self, config: Mapping[str, Any]) -> None:
        """Writes the effective configuration; without a checkpoint, drops the events of an earlier start."""
        if self.saved_step() == 0:
            shutil.rmtree(self.tensorboard, ignore_errors=True)
        self.path.mkdir(parents=True, exist_ok=True)
        self._config.write_text(json.dumps(config, indent=2) + "\n")

    def load(self, engine: DeepSpeedEngine) -> None:
        """Restores the newest checkpoint, on every rank."""
        engine.load_checkpoint(str(self._checkpoints), tag=self._latest.read_text())
        # The scheduler restores its position only: the groups' learning rates follow from that.
        engine.lr_scheduler.step(engine.lr_scheduler.last_batch_iteration)

    def save(self, engine: DeepSpeedEngine) -> None:
        """Saves a checkpoint, on every rank; a kill at any time leaves the one before in force.

        The newest checkpoint and the one before it stay.
        """
        tag = f"global_step{engine.global_steps}"
        engine.save_checkpoint(str(self._checkpoints), tag=tag, save_latest=False)
        dist.barrier()
        if dist.get_rank() == 0:
            kept = {tag, self._latest.read_text() if self._latest.exists() else tag}
            scratch = self._latest.with_suffix(".tmp")
            scratch.write_text(tag)
            os.replace(scratch, self._latest)
            for checkpoint in self._checkpoints.glob("global_step*"):
                if checkpoint.name not in kept:
                    shutil.rmtree(checkpoint)


def _step(tag: str) -> int:
    match = re.fullmatch(r"global_step(\d+)", tag)
    if not match:
        raise RunError(f"checkpoint tag {tag!r}: not one of this program's")
    return int(match[1])


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
