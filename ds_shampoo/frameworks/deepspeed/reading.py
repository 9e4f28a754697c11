"""`engine.load_checkpoint`: everything is checked, on all ranks together, before anything is touched."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.optim import Optimizer

from ds_shampoo.config import GroupSettings
from ds_shampoo.frameworks.deepspeed.experts import ExpertWeights
from ds_shampoo.frameworks.deepspeed.internals import SubGroups
from ds_shampoo.frameworks.deepspeed.provenance import check_world, saved_by_shampoo, slice_rank, without_blocks
from ds_shampoo.frameworks.deepspeed.together import together
from ds_shampoo.optimizer import Shampoo
from ds_shampoo.sharding.gathering import gathered
from ds_shampoo.state import saving
from ds_shampoo.state.commit import finish
from ds_shampoo.state.files import FOLDER, BlockReader
from ds_shampoo.state.index import CheckpointError
from ds_shampoo.state.latest import LATEST, UNIVERSAL, named_by, pointer
from ds_shampoo.step.elementwise import new_state

logger = logging.getLogger("ds_shampoo")


def load(engine: Any, optimizer: Shampoo, *, options: dict[str, Any], deepspeeds: Callable[[], Any]) -> Any:
    """A whole load.

    Args:
        options: the arguments of DeepSpeed's `load_checkpoint` by name; changed.
        deepspeeds: calls it with them.

    Raises:
        CheckpointError: on all ranks, if any of them finds something wrong; nothing is touched then.
    """
    wanted = options["load_optimizer_states"] and not options["load_module_only"]
    experts = ExpertWeights(engine, slice_rank(engine))
    reader = _opened(engine, optimizer, options=options, experts=experts, wanted=wanted)
    if reader is not None and experts:
        options["custom_load_fn"] = experts.loader(reader, options["load_module_strict"], options["custom_load_fn"])
    reader = reader if wanted else None
    if reader is not None and engine.zero_nvme_offload_optimizer():
        with together():
            _expect_moments(engine, optimizer)
    before, made = [dict(group) for group in optimizer.param_groups], optimizer.made()
    with together(own_errors=True), _states_of(optimizer) as states:
        result = deepspeeds()
    if engine.load_universal_checkpoint():
        _keep_settings(optimizer, before, made, reader)
    if result[0] is None:
        return result
    if reader is not None:
        subgroups = optimizer.subgroups(to_load=True)
        with together():
            saving.restore(subgroups, reader)
        optimizer.mend()
    elif wanted:
        if states.newest_is_shampoos:
            raise CheckpointError(without_blocks(Path(result[0]).parent))
        logger.warning("the checkpoint is another optimizer's: its moments are kept, all factors start fresh")
    return result


class _States:
    """What passes an optimizer's `load_state_dict`.

    Attributes:
        newest_is_shampoos: whether the last one was saved by Shampoo.
    """

    def __init__(self) -> None:
        self.newest_is_shampoos = False

    def see(self, _: Optimizer, state_dict: Mapping[str, Any]) -> None:
        """A hook of torch's, called before the state is loaded."""
        self.newest_is_shampoos = "blocks" in state_dict


@contextlib.contextmanager
def _states_of(optimizer: Shampoo) -> Iterator[_States]:
    """The states that the optimizer is given to load meanwhile."""
    states = _States()
    handle = optimizer.register_load_state_dict_pre_hook(states.see)
    try:
        yield states
    finally:
        handle.remove()


def _opened(
    engine: Any, optimizer: Shampoo, *, options: dict[str, Any], experts: ExpertWeights, wanted: bool
) -> BlockReader | None:
    """The checkpoint's folder of blocks, and all that this rank needs of it read and checked; None where there is none.

    The tag that `latest` gave is put into `options`, so that DeepSpeed loads what was checked.

    Args:
        wanted: whether the blocks are, and not the weights alone.
    """
    reader, subgroups = None, optimizer.subgroups(to_load=True)  # which all ranks have to build at once
    by_name = options["tag"] is not None
    with together():
        found = _folder(engine, options)
        if found is not None and dist.get_rank() == 0:
            _finish(found / FOLDER)
    with together():
        if found is not None and (found / FOLDER).is_dir():
            reader = BlockReader(found / FOLDER)
            _check_form(engine, reader, Path(options["load_dir"]), by_name)
            if wanted:
                check_world(engine, reader)
                saving.check(subgroups, reader)
            experts.check(reader)
            reader.verify_foreign(dist.get_rank(), dist.get_world_size(), weights_alone=not wanted)
        elif found is not None and (wanted or experts) and saved_by_shampoo(found):
            raise CheckpointError(without_blocks(found))
        elif found is not None and experts:
            raise CheckpointError(
                f"{found} holds the weights of the first rank's experts only: Shampoo did not save it"
            )
    stamps = gathered((options["tag"], reader.header.stamp if reader is not None else None))
    if len(set(stamps)) > 1:
        raise CheckpointError(
            f"{options['load_dir']}: the ranks found different checkpoints {sorted(map(str, set(stamps)))}: is one "
            "being saved at this moment, or do they see different folders?"
        )
    return reader


def _folder(engine: Any, options: dict[str, Any]) -> Path | None:
    """The checkpoint's folder; None where no checkpoint is named."""
    load_dir, tag = Path(options["load_dir"]), options["tag"]
    if tag is None:
        tag = options["tag"] = named_by(load_dir / (UNIVERSAL if engine.load_universal_checkpoint() else LATEST))
    elif not (load_dir / str(tag)).is_dir():
        raise CheckpointError(f"tag = {tag!r}: there is no folder {load_dir / str(tag)}")
    return load_dir / str(tag) if tag is not None else None


def _finish(folder: Path) -> None:
    """Moves to its place what a save was killed over."""
    try:
        finish(folder)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: a save was cut short when all was written but not moved to its place; that can't be done "
            f"now: {error}"
        ) from error


def _check_form(engine: Any, reader: BlockReader, load_dir: Path, by_name: bool) -> None:
    """Holds a checkpoint's form against the JSON, and what was saved since its conversion against going back.

    Args:
        by_name: whether the caller named the checkpoint, who then knows which it is.

    Raises:
        CheckpointError: for the other form; and for a universal checkpoint unless `latest` names the very save that
            it named at the conversion.
    """
    origin = reader.index.universal
    if (origin is not None) != engine.load_universal_checkpoint():
        form, advice = ("universal", "set") if origin is not None else ("DeepSpeed's usual", "take out")
        raise CheckpointError(
            f"{reader.folder.parent} is in {form} form: {advice} checkpoint.load_universal in the DeepSpeed JSON, or "
            "pass another tag"
        )
    if origin is None or by_name:
        return
    now = pointer(load_dir)
    if now is not None and now != origin.latest:
        raise CheckpointError(
            f"checkpoint.load_universal = true: {load_dir / UNIVERSAL} names {reader.folder.parent.name}, but since it "
            f"was converted the job has saved {now.tag}, which {load_dir / LATEST} names; take load_universal out of "
            "the JSON to go on from that, or pass the tag"
        )


def _expect_moments(engine: Any, optimizer: Shampoo) -> None:
    """Has DeepSpeed read the moments of sub-groups on NVMe from a checkpoint's files: it reads those that it knows of.

    Raises:
        CheckpointError: if a sub-group is too small for NVMe, since DeepSpeed would not restore it.
    """
    groups = SubGroups.of(engine.optimizer)
    for number, (flat, size) in enumerate(zip(groups.flats, groups.sizes, strict=True)):
        if not groups.on_nvme(number):
            raise CheckpointError(
                f"sub-group {number} of {size} elements is too small for NVMe and stays in memory, from where "
                "DeepSpeed does not restore it; raise zero_optimization.sub_group_size"
            )
        if not optimizer.state[flat]:
            optimizer.state[flat].update(new_state(flat.new_empty(size)))


def _keep_settings(
    optimizer: Shampoo,
    before: Sequence[Mapping[str, Any]],
    made: Sequence[Mapping[str, Any]],
    reader: BlockReader | None,
) -> None:
    """Puts the param groups' settings back, which DeepSpeed's universal loader replaces, at stage 3 all by the first's.

    What was changed since the groups were made, the learning rates above all, is the checkpoint's, as without it.

    Args:
        before, made: the groups as they were when the load began, and when they were made.
    """
    scheduled = reader.header.scheduled if reader is not None else []
    for number, (group, former) in enumerate(zip(optimizer.param_groups, before, strict=True)):
        group.update({key: value for key, value in former.items() if key != "params"})
        if len(scheduled) == len(before):
            group.update({key: made[number][key] for key in GroupSettings.model_fields})
            group.update({key: tuple(v) if isinstance(v, list) else v for key, v in scheduled[number].items()})
