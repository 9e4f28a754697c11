"""`engine.save_checkpoint` and `load_checkpoint`, with the folder `shampoo/` beside DeepSpeed's own files."""

from __future__ import annotations

import functools
import inspect
import logging
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError

from ds_shampoo import saving
from ds_shampoo.checkpoint.files import FOLDER, BlockReader, CheckpointError, replace_text, write_file, write_index
from ds_shampoo.deepspeed.experts import ExpertWeights
from ds_shampoo.deepspeed.provenance import check_world, describe, saved_by_shampoo, slice_rank, without_blocks
from ds_shampoo.elementwise import new_state
from ds_shampoo.optimizer import Shampoo

logger = logging.getLogger("ds_shampoo")


def attach(engine: Any, optimizer: Shampoo) -> None:
    """Has this engine's own `save_checkpoint` and `load_checkpoint` take Shampoo's blocks along.

    Both keep DeepSpeed's arguments and results. Only the one engine changes, and no file of DeepSpeed's.
    """
    engine.save_checkpoint = _saving(engine, optimizer, engine.save_checkpoint)
    engine.load_checkpoint = _loading(engine, optimizer, engine.load_checkpoint)


def _saving(engine: Any, optimizer: Shampoo, deepspeeds: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(deepspeeds)
    def save_checkpoint(*positional: Any, **named: Any) -> Any:
        call = _bound(deepspeeds, positional, named)
        options = call.arguments
        _refuse_between_micro_batches(engine)
        tag = str(options["tag"] if options["tag"] is not None else f"global_step{engine.global_steps}")
        _save_blocks(engine, optimizer, Path(options["save_dir"], tag, FOLDER))
        # DeepSpeed writes `latest` in place; a kill in between would leave it empty.
        ours = options["save_latest"] and not _commits_later(engine)
        if ours:
            options["save_latest"] = False
        result = deepspeeds(*call.args, **call.kwargs)
        if ours and engine.global_rank == 0:
            replace_text(Path(options["save_dir"], "latest"), tag)
        dist.barrier()
        return result

    return save_checkpoint


def _loading(engine: Any, optimizer: Shampoo, deepspeeds: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(deepspeeds)
    def load_checkpoint(*positional: Any, **named: Any) -> Any:
        call = _bound(deepspeeds, positional, named)
        options = call.arguments
        wanted = options["load_optimizer_states"] and not options["load_module_only"]
        folder = _folder(engine, options["load_dir"], options["tag"])
        experts = ExpertWeights(engine, slice_rank(engine))
        reader = None
        if folder is not None and (wanted or experts):
            reader = _opened(engine, optimizer, folder, experts, wanted)
        if reader is not None and experts:
            options["custom_load_fn"] = experts.loader(reader, options["load_module_strict"], options["custom_load_fn"])
        reader = reader if wanted else None
        if reader is not None and engine.zero_nvme_offload_optimizer():
            _expect_moments(engine, optimizer)
        optimizer.took_up_shampoo = False
        before = [dict(group) for group in optimizer.param_groups]
        result = deepspeeds(*call.args, **call.kwargs)
        if engine.load_universal_checkpoint():
            _keep_settings(optimizer, before, reader)
        if result[0] is None:
            return result
        if reader is not None:
            saving.restore(optimizer.units(), reader)
        elif wanted:
            if optimizer.took_up_shampoo:
                raise CheckpointError(without_blocks(Path(result[0]).parent))
            logger.warning("the checkpoint is another optimizer's: its moments are kept, all factors start fresh")
        return result

    return load_checkpoint


def _bound(function: Callable[..., Any], positional: Sequence[Any], named: Mapping[str, Any]) -> inspect.BoundArguments:
    """The arguments of a call by name, defaults filled in, to be read and changed before the call is made."""
    call = inspect.signature(function).bind(*positional, **named)
    call.apply_defaults()
    return call


def _refuse_between_micro_batches(engine: Any) -> None:
    parts = engine.gradient_accumulation_steps()
    done = engine.micro_steps % parts
    if done and not engine.pipeline_parallelism:
        raise CheckpointError(
            f"save_checkpoint after micro-batch {done} of {parts}: the gradients of a step half done are in no "
            "checkpoint; save after the step"
        )


def _save_blocks(engine: Any, optimizer: Shampoo, folder: Path) -> None:
    """Every rank writes its blocks; then one writes the index of all.

    Raises:
        CheckpointError: on all ranks, if any of them can't write; the folder's former content stays in force.
    """
    stamp = [uuid.uuid4().hex[:8]]
    dist.broadcast_object_list(stamp, src=0)
    units = optimizer.units()
    states, header = saving.blocks_state(unit.sharded for unit in units), saving.header(units)
    if slice_rank(engine) > 0:  # what is not sliced is written by the first of those that have it
        sliced = optimizer.sliced_parameters()
        states = {name: state for name, state in states.items() if name.rpartition("[")[0] in sliced}
    name = f"rank{engine.global_rank:05d}-{stamp[0]}.safetensors"
    weights = ExpertWeights(engine, slice_rank(engine)).to_save()
    own, problem = [], ""
    try:
        own.append(write_file(folder, name, states))
        if weights:
            own.append(write_file(folder, f"experts-{name}", weights))
    except (OSError, SafetensorError) as error:
        problem = f"{folder / name}: {error}"
    _raise_together(problem)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (own, header))
    entries = [entry for each, _ in gathered for entry in each]
    names = Counter(name for entry in entries for name in entry.blocks)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise CheckpointError(f"{folder}: {len(twice)} blocks belong to more than one rank, {twice[0]} first")
    if engine.global_rank == 0:
        steps = {name: step for _, other in gathered for name, step in other["steps"].items()}
        whole = {**header, **describe(engine, optimizer.param_groups), "steps": steps}
        try:
            write_index(folder, whole, entries)
        except OSError as error:
            problem = f"{folder}: {error}"
    _raise_together(problem)


def _raise_together(problem: str) -> None:
    """Returns once all ranks are here, if none of them has a problem.

    Raises:
        CheckpointError: on all ranks, of the first that has one.
    """
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    first = next((f"rank {rank}: {each}" for rank, each in enumerate(problems) if each), None)
    if first is not None:
        raise CheckpointError(first)


def _folder(engine: Any, load_dir: str, tag: str | None) -> Path | None:
    """Where a checkpoint's folder of blocks is or would be; None where no checkpoint is named.

    Raises:
        CheckpointError: where a universal checkpoint would take a job back behind one that it has saved since.
    """
    latest, universal = Path(load_dir, "latest"), Path(load_dir, "latest_universal")
    named = universal if engine.load_universal_checkpoint() else latest
    if tag is None and named.is_file():
        tag = named.read_text().strip()
        if named is universal and latest.is_file() and latest.stat().st_mtime > universal.stat().st_mtime:
            raise CheckpointError(
                f"checkpoint.load_universal = true: {universal} names {tag}, but {latest} is newer and names "
                f"{latest.read_text().strip()}; take load_universal out of the JSON to go on from that, or pass the tag"
            )
    return Path(load_dir, str(tag), FOLDER) if tag is not None else None


def _opened(engine: Any, optimizer: Shampoo, folder: Path, experts: ExpertWeights, wanted: bool) -> BlockReader | None:
    """The folder, checked before anything is loaded; None where there is none.

    Args:
        wanted: whether the blocks are, and not the weights alone.

    Raises:
        CheckpointError: on all ranks, if any of them finds something wrong.
    """
    reader, problem, units = None, "", optimizer.units()  # which all ranks have to build at once
    if folder.is_dir():
        try:
            reader = BlockReader(folder)
            if wanted:
                check_world(engine, reader)
                saving.check(units, reader)
            experts.check(reader)
        except CheckpointError as error:
            problem = str(error)
    elif saved_by_shampoo(folder.parent):
        problem = without_blocks(folder.parent)
    elif experts and folder.parent.is_dir():
        problem = f"{folder.parent} holds the weights of the first rank's experts only: Shampoo did not save it"
    _raise_together(problem)
    return reader


def _expect_moments(engine: Any, optimizer: Shampoo) -> None:
    """Has DeepSpeed read the moments of sub-groups on NVMe from a checkpoint's files: it reads those that it knows of.

    Raises:
        CheckpointError: if a sub-group is too small for NVMe, since DeepSpeed would not restore it.
    """
    zero = engine.optimizer
    sizes = zero.fp16_partitioned_groups_flat_numel
    for number, (flat, size) in enumerate(zip(zero.fp32_partitioned_groups_flat, sizes, strict=True)):
        if not zero._swappable_optimizer_subgroup(number):
            raise CheckpointError(
                f"sub-group {number} of {size} elements is too small for NVMe and stays in memory, from where "
                "DeepSpeed does not restore it; raise zero_optimization.sub_group_size"
            )
        if not optimizer.state[flat]:
            optimizer.state[flat].update(new_state(flat.new_empty(size)))


def _keep_settings(optimizer: Shampoo, before: Sequence[Mapping[str, Any]], reader: BlockReader | None) -> None:
    """Puts the param groups' settings back, which DeepSpeed's universal loader replaces, at stage 3 all by the first's.

    The learning rates are the checkpoint's, as they are without it.
    """
    rates = reader.header["learning_rates"] if reader is not None else []
    for number, (group, former) in enumerate(zip(optimizer.param_groups, before, strict=True)):
        group.update({key: value for key, value in former.items() if key != "params"})
        if len(rates) == len(before):
            group.update(rates[number])


def _commits_later(engine: Any) -> bool:
    """Whether the checkpoint engine writes in the background and names the latest checkpoint itself."""
    ask = getattr(engine.checkpoint_engine, "is_decoupled", None)
    return bool(ask()) if ask is not None else False
