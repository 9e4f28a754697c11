"""What the workers run to break checkpoints: saves that are cut short, damaged files, gradients that are half done."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed.comm as dist
import pytest
import torch

import ds_shampoo.state.files
from tests.distributed.jobs import batch, engine_of, fingerprint, flat, train


class Killed(BaseException):
    """In place of a signal: nothing catches it, and nothing of the save goes on."""


@contextlib.contextmanager
def killed_at(operation: int) -> Iterator[list[str]]:
    """Everything that writes ends the save when it is called for the n-th time, half done where it can be.

    Yields:
        The names of what was called.
    """
    called: list[str] = []

    def deadly(function: Callable[..., Any], name: str, path_at: int | None) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            called.append(name)
            if len(called) - 1 != operation:
                return function(*arguments, **named)
            if path_at is not None:
                function(*arguments, **named)
                path = Path(arguments[path_at])
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            raise Killed(name)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", deadly(torch.save, "save", 1))
        files = ds_shampoo.state.files
        patch.setattr(files, "save_file", deadly(files.save_file, "save_file", 1))
        patch.setattr(os, "replace", deadly(os.replace, "replace", None))
        patch.setattr(Path, "write_text", deadly(Path.write_text, "write_text", 0))
        patch.setattr(Path, "chmod", deadly(Path.chmod, "chmod", None))
        patch.setattr(Path, "unlink", deadly(Path.unlink, "unlink", None))
        patch.setattr(shutil, "copyfile", deadly(shutil.copyfile, "copyfile", 1))
        yield called


def saves_cut_short(config: dict[str, Any], folder: str, tag: str | None) -> list[tuple[str, str]]:
    """A second save killed at each of the operations in which it writes, and what loads afterwards.

    Returns:
        By operation, its name, and "first", "second", the refusal's message, or "other" for a state that was neither.
    """
    outcomes = []
    job, pristine = Path(folder, "job"), Path(folder, "pristine")
    with engine_of(config) as engine:
        train(engine, 0, 6)
        engine.save_checkpoint(str(pristine), tag)
        first = fingerprint(engine, engine.basic_optimizer)
        train(engine, 6, 2)
        second = fingerprint(engine, engine.basic_optimizer)
        operation = 0
        while True:
            shutil.rmtree(job, ignore_errors=True)
            shutil.copytree(pristine, job)
            try:
                with killed_at(operation) as called:
                    engine.save_checkpoint(str(job), tag)
            except Killed as killed:
                outcomes.append((str(killed), loaded(config, str(job), first, second)))
                operation += 1
                continue
            assert len(called) == operation
            outcomes.append(("done", loaded(config, str(job), first, second)))
            return outcomes


def loaded(config: dict[str, Any], folder: str, first: str, second: str) -> str:
    """Which of two states a new engine takes up, or why it refuses."""
    with engine_of(config) as engine:
        before = fingerprint(engine, engine.basic_optimizer)
        try:
            engine.load_checkpoint(folder)
        except ds_shampoo.state.files.CheckpointError as error:
            assert fingerprint(engine, engine.basic_optimizer) == before
            return str(error)
        found = fingerprint(engine, engine.basic_optimizer)
        return {first: "first", second: "second"}.get(found, "other")


def saving_for_ever(config: dict[str, Any], folder: str, tag: str, notes: str) -> None:
    """Saves under one tag after every step; each rank notes the state before each save."""
    with engine_of(config) as engine:
        for step in range(10**6):
            train(engine, step, 1)
            with Path(notes, f"rank{dist.get_rank()}").open("a") as file:
                file.write(fingerprint(engine, engine.basic_optimizer) + "\n")
            engine.save_checkpoint(folder, tag)


def state_after_loading(config: dict[str, Any], folder: str) -> tuple[str, str]:
    """A message and the state, of which one is empty."""
    with engine_of(config) as engine:
        before = fingerprint(engine, engine.basic_optimizer)
        try:
            path, _ = engine.load_checkpoint(folder)
        except RuntimeError as error:
            assert fingerprint(engine, engine.basic_optimizer) == before
            return str(error), ""
        return "", fingerprint(engine, engine.basic_optimizer) if path is not None else ""


def damaged_in_turn(config: dict[str, Any], folder: str, damages: list[tuple[str, int]]) -> list[tuple[str, bool]]:
    """Loads with one bit of one file flipped after the other.

    Args:
        damages: file and bit.

    Returns:
        For each, the refusal's message, and whether every state was left alone; no message means that it loaded.
    """
    found = []
    with engine_of(config) as engine:
        train(engine, 0, 2)
        before = fingerprint(engine, engine.basic_optimizer)
        for name, bit in damages:
            path = Path(folder, name)
            if dist.get_rank() == 0:
                usual = path.read_bytes()
                path.write_bytes(usual[: bit // 8] + bytes([usual[bit // 8] ^ 1 << bit % 8]) + usual[bit // 8 + 1 :])
            dist.barrier()
            message = ""
            try:
                engine.load_checkpoint(folder)
            except ds_shampoo.state.files.CheckpointError as error:
                message = str(error)
            found.append((message, fingerprint(engine, engine.basic_optimizer) == before))
            dist.barrier()
            if dist.get_rank() == 0:
                path.write_bytes(usual)
            dist.barrier()
    return found


def failing_on_one_rank(config: dict[str, Any], folder: str, what: str, rank: int, error: str) -> tuple[str, str, bool]:
    """A save or load in which one call fails on one rank only.

    Returns:
        The message, the type of the error, and whether a save afterwards, and a step, go well on all ranks.
    """
    errors = {"OSError": OSError(28, "No space left on device"), "MemoryError": MemoryError(), "KeyError": KeyError(1)}

    def fail(*_: Any, **__: Any) -> Any:
        raise errors[error]

    place, name = {
        "latest": ("ds_shampoo.frameworks.deepspeed.writing", "replace_text"),
        "index": ("ds_shampoo.frameworks.deepspeed.writing", "write_index"),
        "blocks": ("ds_shampoo.frameworks.deepspeed.writing", "write_file"),
        "digest": ("ds_shampoo.frameworks.deepspeed.writing", "digest"),
        "deepspeed": ("torch", "save"),
        "script": ("deepspeed.runtime.engine", "copyfile"),
        "read": ("ds_shampoo.state.files", "_read"),
        "verify": ("ds_shampoo.state.files", "differs"),
        "open": ("ds_shampoo.frameworks.deepspeed.reading", "BlockReader"),
    }[what]
    with engine_of(config) as engine, pytest.MonkeyPatch.context() as patch:
        train(engine, 0, 1)
        engine.save_checkpoint(folder, "first")
        before = fingerprint(engine, engine.basic_optimizer)
        if dist.get_rank() == rank:
            patch.setattr(f"{place}.{name}", fail)
        message, kind = "", ""
        try:
            if what in ("read", "verify", "open"):
                engine.load_checkpoint(folder)
            else:
                engine.save_checkpoint(folder, "second")
        except Exception as caught:
            message, kind = str(caught), type(caught).__name__
        assert fingerprint(engine, engine.basic_optimizer) == before
        patch.undo()
        assert Path(folder, "latest").read_text() == "first"
        dist.barrier()
        if what in ("blocks", "digest", "deepspeed", "script"):
            assert not list(Path(folder, "second", "shampoo").iterdir())
        train(engine, 1, 1)
        engine.save_checkpoint(folder, "third")
        return message, kind, Path(folder, "latest").read_text() == "third"


def empty_names(config: dict[str, Any], folder: str) -> list[str]:
    """What saving without a folder or tag says; nothing may be written, here or there."""
    messages = []
    os.chdir(folder)
    with engine_of(config) as engine:
        train(engine, 0, 1)
        for save_dir, tag in ((None, None), ("", None), (None, "x"), (folder, "")):
            try:
                engine.save_checkpoint(save_dir, tag)
            except ValueError as error:
                messages.append(str(error))
    return messages


def micro_batch(engine: Any, number: int = 0, direct: bool = False) -> None:
    windows = batch(number)[:2]
    loss = engine(windows[:, :-1], windows[:, 1:])
    if direct:
        engine.scale(loss / engine.gradient_accumulation_steps()).backward()
    else:
        engine.backward(loss)


def saves(engine: Any, folder: str) -> bool:
    """Whether saving is possible now."""
    try:
        engine.save_checkpoint(folder, "any")
    except ds_shampoo.state.files.CheckpointError as error:
        return "between micro-batches" not in str(error)
    return True


def accumulating(config: dict[str, Any], folder: str, direct: bool) -> dict[str, list[bool]]:
    """In several ways of accumulating four micro-batches a step, whether saving is possible at their moments."""
    found: dict[str, list[bool]] = {}
    with engine_of(config) as engine:
        found["new"] = [saves(engine, folder)]
        found["engine"] = []
        for number in range(4):
            micro_batch(engine, number, direct)
            found["engine"].append(saves(engine, folder))
            engine.step()
            found["engine"].append(saves(engine, folder))
        found["loaded between"] = []
        micro_batch(engine, direct=direct)
        engine.load_checkpoint(folder, "any")
        found["loaded between"].append(saves(engine, folder))
    with engine_of(config) as engine:
        engine.load_checkpoint(folder, "any")
        found["loaded"] = [saves(engine, folder)]
        found["by hand"] = []
        for number in range(6):  # as Accelerate does: one engine.step() for all micro-batches of a step
            engine.set_gradient_accumulation_boundary(number % 3 == 2)
            micro_batch(engine, number, direct)
            if number % 3 == 2:
                engine.step()
            found["by hand"].append(saves(engine, folder))
        engine.set_gradient_accumulation_boundary(False)
        micro_batch(engine, direct=direct)
        engine.step()  # which steps nothing
        found["by hand"].append(saves(engine, folder))
    with engine_of(config) as engine:
        found["other size"] = []
        for parts in (4, 3, 2):
            engine.set_train_batch_size(parts * engine.train_micro_batch_size_per_gpu() * dist.get_world_size())
            engine.micro_steps = engine.micro_steps // parts * parts  # begins a step, as a trainer would see to
            for number in range(parts):
                micro_batch(engine, number, direct)
                engine.step()
                found["other size"].append(saves(engine, folder))
    return found


def overflow_then_save(config: dict[str, Any], folder: str) -> tuple[int, bool]:
    """How many steps overflowed, and whether saving was possible after each of them."""
    with engine_of(config) as engine:
        possible = True
        for step in range(4):
            train(engine, step, 1)
            possible &= saves(engine, folder)
        return engine.skipped_steps, possible


def unfrozen_later(config: dict[str, Any], folder: str) -> list[bool]:
    """Whether a half-done gradient is seen where only what was frozen at the start is trained."""
    import ds_shampoo
    from tests.distributed.jobs import build_model

    model = build_model()
    first, *others = model.parameters()
    for parameter in others:
        parameter.requires_grad_(False)
    engine, *_ = ds_shampoo.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    try:
        first.requires_grad_(False)
        others[-1].requires_grad_(True)
        micro_batch(engine)
        found = [saves(engine, folder)]
        engine.step()
        return found
    finally:
        engine.destroy()


def weights(config: dict[str, Any], folder: str, **options: Any) -> tuple[str, bool]:
    """The message with which loading of weights alone fails, and whether the weights are left alone."""
    with engine_of(config) as engine:
        before = flat(engine.module)
        message = ""
        try:
            engine.load_checkpoint(folder, load_module_only=True, load_optimizer_states=False, **options)
        except ds_shampoo.state.files.CheckpointError as error:
            message = str(error)
        return message, bool((flat(engine.module) == before).all())


def going_on_under_one_tag(config: dict[str, Any], folder: str) -> None:
    """Resumes, goes on, and saves over the checkpoint that it began with."""
    with engine_of(config) as engine:
        engine.load_checkpoint(folder)
        train(engine, 3, 2)
        engine.save_checkpoint(folder, Path(folder, "latest").read_text())


def broken_on_one_rank(config: dict[str, Any], folder: str) -> tuple[str, bool]:
    """A step that fails half-way on rank 1: what saving says on all ranks, and whether loading mends it."""
    with engine_of(config) as engine:
        train(engine, 0, 1)
        engine.save_checkpoint(folder, "good")
        before = fingerprint(engine, engine.basic_optimizer)
        train(engine, 1, 1)
        if dist.get_rank() == 1:
            engine.basic_optimizer._transaction.fail(RuntimeError("out of memory"))
        message = ""
        try:
            engine.save_checkpoint(folder, "bad")
        except ds_shampoo.state.files.CheckpointError as error:
            message = str(error)
        engine.load_checkpoint(folder)
        same = fingerprint(engine, engine.basic_optimizer) == before
        train(engine, 1, 1)
        return message, same
