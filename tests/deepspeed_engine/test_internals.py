"""What is private of DeepSpeed's: named in one file only, and held against the installed release before training."""

from __future__ import annotations

import ast
import functools
import logging
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import deepspeed.runtime.engine
import pytest
import torch
from torch import nn

import ds_shampoo
from ds_shampoo import SettingsError
from ds_shampoo.frameworks import installed
from ds_shampoo.frameworks.deepspeed import internals
from ds_shampoo.frameworks.deepspeed.internals import DEEPSPEED, NAMES, STOOD_IN_FOR, SubGroups
from ds_shampoo.frameworks.deepspeed.support import refuse_unsupported
from ds_shampoo.frameworks.privates import Entry, Function, Method, Private, resolve
from tests.distributed.jobs import SHAMPOO, engine_config, engine_of
from tests.distributed.pool import WorkerPool
from tests.frameworks.moving import move

Pools = Callable[[int], WorkerPool]

PACKAGE = Path(ds_shampoo.__file__).parent
ALL = [*NAMES, *STOOD_IN_FOR]
LATER = [name for name in ALL if name.since]
ENTRIES = [name for name in ALL if isinstance(name, Entry) and name.kind is not object]
CALLED = [name for name in ALL if isinstance(name, Function) or (isinstance(name, Method) and not name.passed_on)]

# What the documentation of DeepSpeed's engine shows: its pages on training, checkpoints and model parallelism.
DOCUMENTED = {
    *("module", "optimizer", "mpu", "device", "global_rank", "global_steps", "train_batch_size"),
    *("save_checkpoint", "load_checkpoint", "load_universal_checkpoint"),
    *("zero_optimization", "zero_optimization_stage", "zero_nvme_offload_optimizer"),
}

# Modules from which it has its users import.
MODULES = {
    *("deepspeed", "deepspeed.moe.layer", "deepspeed.ops.op_builder", "deepspeed.pipe"),
    "deepspeed.runtime.pipe.topology",
}

# Private all the same, and no framework's: of the C library, of Python and of torch.
NOT_A_FRAMEWORKS = {"_exit", "_ZSt13set_terminatePFvvE", "_getframe", "_version"}

# What still names DeepSpeed's own outside the one file.
EXCEPTIONS = {
    "frameworks/megatron_deepspeed/pipeline.py": {"pipeline"},  # the JSON's section
    "parameters/marks.py": {"allreduce", "ds_shape"},  # where no engine is there yet, or Megatron alone
}


@pytest.fixture(autouse=True)
def unchecked() -> Iterator[None]:
    """As in a new process, and afterwards too."""
    installed._check.cache_clear()
    yield
    installed._check.cache_clear()


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    logger = logging.getLogger("ds_shampoo")
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(caplog.handler)
    yield lambda: [record.getMessage() for record in caplog.records]
    logger.removeHandler(caplog.handler)
    logger.propagate = propagates


def test_all_are_there() -> None:
    assert [(str(name), name.fault()) for name in ALL if name.fault()] == []
    DEEPSPEED.check()
    assert len({name.name for name in NAMES}) == len(NAMES), "one name, one meaning"


@pytest.mark.parametrize("name", ALL, ids=str)
def test_what_moved_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: Private) -> None:
    move(monkeypatch, name)
    with pytest.raises(SettingsError) as error:
        DEEPSPEED.check()
    message = str(error.value)
    assert re.search(rf"has it otherwise: {re.escape(str(name))} \([^;]*\)\. Shampoo", message), "it, and it alone"
    assert f"DeepSpeed {deepspeed.__version__} lacks" in message
    assert "tested with DeepSpeed 0.19.8" in message


def test_all_that_moved_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = [name for name in ALL if isinstance(name, Method)]
    with monkeypatch.context() as patch:
        for name in moved:
            move(patch, name)
        with pytest.raises(SettingsError) as error:
            refuse_unsupported(SimpleNamespace())
    assert [str(name) for name in moved if f"{name} (" not in str(error.value)] == []


@pytest.mark.parametrize("path", sorted({name.owner for name in ALL if "." in name.owner}))
def test_a_class_or_module_that_is_gone(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    parent, _, name = path.rpartition(".")
    found = resolve(path)
    with monkeypatch.context() as patch:
        if isinstance(found, type):
            patch.delattr(resolve(parent), name)
        else:
            patch.setitem(sys.modules, path, None)
            patch.delattr(resolve(parent), name)
        with pytest.raises(SettingsError, match=f"there is no {re.escape(path)}"):
            DEEPSPEED.check()


@pytest.mark.parametrize("name", CALLED, ids=str)
def test_other_parameters_are_refused(monkeypatch: pytest.MonkeyPatch, name: Private) -> None:
    def wants_more(*positional: Any, one_that_is_new: Any, **named: Any) -> None: ...

    def takes_nothing() -> None: ...

    for other in (wants_more, takes_nothing):
        with monkeypatch.context() as patch:
            patch.setattr(resolve(name.owner), name.name, other)
            with pytest.raises(SettingsError, match=rf"{re.escape(str(name))} \(it takes \("):
                DEEPSPEED.check()


@pytest.mark.parametrize("name", ENTRIES, ids=str)
def test_another_type_is_refused(monkeypatch: pytest.MonkeyPatch, name: Entry) -> None:
    monkeypatch.setattr(resolve(name.owner), name.name, [])
    with pytest.raises(SettingsError, match=rf"{re.escape(str(name))} \(it is a list, not a {name.kind.__name__}\)"):
        DEEPSPEED.check()


@pytest.mark.parametrize("name", LATER, ids=str)
def test_what_older_releases_lack(monkeypatch: pytest.MonkeyPatch, name: Private) -> None:
    move(monkeypatch, name)
    *front, last = name.since
    monkeypatch.setattr(deepspeed, "__version__", ".".join(map(str, [*front, last - 1])))
    DEEPSPEED.check()
    monkeypatch.setattr(deepspeed, "__version__", ".".join(map(str, name.since)))
    with pytest.raises(SettingsError, match=re.escape(str(name))):
        DEEPSPEED.check()


@pytest.mark.parametrize(
    ("version", "rank", "warns"),
    [
        ("0.19.8", "0", False),
        ("0.19.12", "0", False),
        ("0.16.0", "0", False),
        ("0.20.0", "0", True),
        ("1.0.0+abc", "0", True),
        ("unknown", "0", True),
        ("0.20.0", "1", False),
    ],
)
def test_newer_releases_are_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, messages: Callable[[], list[str]], version: str, rank: str, warns: bool
) -> None:
    monkeypatch.setattr(deepspeed, "__version__", version)
    monkeypatch.setenv("RANK", rank)
    for _ in range(3):
        refuse_unsupported(SimpleNamespace())
    text = f"Shampoo was tested with DeepSpeed 0.19.8, not with {version}; all that it uses was found there"
    assert messages() == ([text] if warns else [])


def test_oldest_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed, "__version__", "0.15.4")
    with pytest.raises(SettingsError, match=r"DeepSpeed 0\.15\.4: Shampoo needs 0\.16 or newer"):
        DEEPSPEED.check()
    required = (PACKAGE.parent / "pyproject.toml").read_text()
    assert f'"deepspeed>={".".join(map(str, DEEPSPEED.oldest))}"' in required


def refused_at_start(stage: int) -> str:
    """What `deepspeed.initialize` says with a method of stage 3's gone."""
    installed._check.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr("deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3._swappable_optimizer_subgroup")
        try:
            with engine_of(engine_config(SHAMPOO, stage, 1), plain=True):
                return ""
        except SettingsError as error:
            return str(error)


def test_engines_are_refused_at_start(pools: Pools) -> None:
    (message,) = pools(1).run(refused_at_start, 1)
    assert "DeepSpeedZeroOptimizer_Stage3._swappable_optimizer_subgroup (there is no such method)" in message


@pytest.mark.parametrize(
    ("read", "what"),
    [
        (lambda thing: SubGroups.of(thing), "fp32_partitioned_groups_flat"),
        (lambda thing: internals.flattened(thing, torch.zeros(1)), "single_partition_of_fp32_groups"),
        (lambda thing: internals.replicas(thing, None), "seq_data_parallel_group"),
        (lambda thing: internals.replicas(thing, "ep_size_2"), "expert_data_parallel_group"),
        (lambda thing: internals.divides_the_model(thing), "has_moe_layers"),
        (lambda thing: internals.monitor(thing), "monitor"),
        (lambda thing: internals.samples(thing), "global_samples"),
        (lambda thing: internals.checkpoint_writer(thing), "checkpoint_engine"),
        (lambda thing: internals.given_optimizer(thing), "client_optimizer"),
        (lambda thing: internals.sharers(thing), "_dp_group"),
        (lambda thing: internals.piece(thing), "ds_tensor"),
        (lambda thing: internals.piece_numel(thing), "partition_numel"),
    ],
)
@pytest.mark.parametrize("thing", [SimpleNamespace(), nn.Linear(1, 1)], ids=["object", "module"])
def test_what_instances_lack_is_named(read: Callable[[Any], Any], what: str, thing: Any) -> None:
    owner = next(str(name) for name in NAMES if name.name == what)
    expected = (
        f"a {type(thing).__name__} has no '{what}', where Shampoo looks for {re.escape(owner)} of DeepSpeed 0.19.8"
    )
    with pytest.raises(RuntimeError, match=expected):
        read(thing)


def test_experts_without_a_group() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    assert internals.expert_group(parameter) is None
    parameter.allreduce = False  # type: ignore[attr-defined]
    assert internals.has_unknown_group(parameter)
    with pytest.raises(
        RuntimeError, match=r"a Parameter has no 'group_name', where Shampoo looks for Experts\.group_name"
    ):
        internals.expert_group(parameter)
    parameter.group_name = "ep_size_2"  # type: ignore[attr-defined]
    assert internals.expert_group(parameter) == "ep_size_2"


def files() -> list[Path]:
    """All of the package but the one file, and what Megatron's own boundary holds."""
    return [
        path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != Path(internals.__file__)
        and not path.relative_to(PACKAGE).as_posix().startswith("frameworks/megatron/")
    ]


@functools.cache
def own_names() -> frozenset[str]:
    """The private attributes and methods that classes of the package define."""
    found = set()
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                found.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ours(node.value):
                found.add(node.attr)
    return frozenset(found)


def ours(receiver: ast.expr) -> bool:
    """Whether attributes of it are of the package's own objects or functions by their looks."""
    name = receiver.id if isinstance(receiver, ast.Name) else ""
    is_super = isinstance(receiver, ast.Call) and isinstance(receiver.func, ast.Name) and receiver.func.id == "super"
    return name in ("self", "cls", "internals", "DEEPSPEED") or is_super


def root(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute | ast.Call):
        node = node.value if isinstance(node, ast.Attribute) else node.func
    return node.id if isinstance(node, ast.Name) else ""


def named_in(source: str, own: frozenset[str]) -> Iterator[str]:
    """DeepSpeed's own names, and private ones of other foreign objects, that a file reads or writes."""
    table = {name.name for name in NAMES}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and not ours(node.value):
            private = node.attr.startswith("_") and not node.attr.endswith("__") and node.attr not in own
            foreign = private and root(node) != "torch" and node.attr not in NOT_A_FRAMEWORKS
            of_engine = isinstance(node.value, ast.Name) and node.value.id in ("engine", "e")
            if node.attr in table or foreign or (of_engine and node.attr not in DOCUMENTED):
                yield node.attr
        elif isinstance(node, ast.Constant) and node.value in table:
            yield str(node.value)
        elif isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "deepspeed":
            if node.module not in MODULES:
                yield str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("deepspeed."))


@pytest.mark.parametrize("path", files(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_other_file_names_what_is_private(path: Path) -> None:
    found = set(named_in(path.read_text(), own_names()))
    assert found - EXCEPTIONS.get(path.relative_to(PACKAGE).as_posix(), set()) == set()


@pytest.mark.parametrize(
    "line",
    [
        "zero.fp16_groups",
        "parameter.ds_tensor = None",
        "getattr(parameter, 'allreduce', True)",
        "setattr(parameter, 'group_name', name)",
        "engine._config",
        "engine.optimizer._something",
        "engine.dp_world_size",
        "del engine.checkpoint_engine",
        "from deepspeed.utils import groups",
        "import deepspeed.runtime.engine",
        "names = ('bit16_groups',)",
    ],
)
def test_such_lines_are_found(line: str) -> None:
    assert list(named_in(line, own_names()))
