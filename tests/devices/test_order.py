"""Nothing is read or written by the device and the host, or by two streams, without one waiting for the other."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_shampoo import Shampoo
from ds_shampoo.roots.transfer import HostCopy, Transfers
from ds_shampoo.sharding.layout import WholeLayout
from ds_shampoo.step.work import StepWork
from tests.devices import streams
from tests.devices.simulated import DEVICE, SimTensor, Simulation, simulated_device

SHAPES = [(8, 6), (4, 4), (9,), (6, 8), (4, 3, 2)]
USUAL: dict[str, Any] = {"lr": 0.01, "block_size": 4, "root_interval": 4, "root_delay": 2, "root_threads": 2}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulation]:
    with simulated_device(monkeypatch) as simulation:
        yield simulation


class Blocks(WholeLayout):
    """Keeps blocks elsewhere than the parameters, as under ZeRO-Offload."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def device(self, parameter: Tensor) -> torch.device:
        return self._device


class Job:
    """A model without a forward pass, whose gradients the device writes, step after step, over those of before."""

    def __init__(
        self, simulation: Simulation, where: torch.device = DEVICE, pinned: bool = False, **settings: Any
    ) -> None:
        self.simulation = simulation
        generator = torch.Generator("cpu").manual_seed(0)
        self.params = []
        for shape in SHAPES:
            param, grad = (torch.empty(shape, dtype=torch.float32, device=where, pin_memory=pinned) for _ in range(2))
            param.copy_(torch.randn(shape, dtype=torch.float32, device="cpu", generator=generator))
            param.requires_grad_(True).grad = grad
            self.params.append(param)
        self.settings, self.taken = settings, 0
        self.optimizer = self.build()

    def build(self) -> Shampoo:
        layout = self.settings.get("layout")
        first, second = (
            {"params": self.params[:3]},
            {"params": self.params[3:], "root_interval": max(2, USUAL["root_delay"])},
        )
        return Shampoo([first, second], **{**USUAL, **self.settings, "layout": layout})

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.taken += 1
            generator = torch.Generator("cpu").manual_seed(self.taken)
            for param in self.params:
                values = torch.randn(param.shape, dtype=torch.float32, device="cpu", generator=generator)
                assert param.grad is not None
                param.grad.copy_(values, non_blocking=True)
            self.optimizer.step()

    def values(self) -> list[Tensor]:
        with torch.no_grad():
            return [param.to("cpu", copy=True) for param in self.params]


def plain(**settings: Any) -> Job:
    """The same job on the CPU, where nothing is simulated."""
    return Job(None, torch.device("cpu"), **settings)  # type: ignore[arg-type]


def races(simulation: Simulation) -> list[str]:
    gc.collect()
    return simulation.races


SETTINGS: dict[str, dict[str, Any]] = {
    "usual": {},
    "interval-1": {"root_interval": 1, "root_delay": 1},
    "next-step": {"root_delay": 1},
    "inline": {"root_overlap": False},
    "inline-at-once": {"root_overlap": False, "root_delay": 0},
    "bf16-roots": {"root_dtype": "bfloat16"},
    "refresh": {"root_refresh_threshold": 0.9, "root_interval": 2, "root_delay": 1},
    "normalized": {"grafting": "adam_normalized"},
    "none": {"grafting": "none"},
    "after": {"momentum": "after"},
    "spectral": {"preconditioner": "spectral", "matmul_precision": "medium"},
    "polar": {"preconditioner": "polar", "matmul_precision": "medium"},
    "statistics-interval": {"statistics_interval": 3},
    "late": {"start_preconditioning_step": 5},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_steps_have_no_race_no_sync_and_the_right_values(device: Simulation, name: str) -> None:
    """The host waits for the device with inline roots alone, which have to have the statistics."""
    job, own = Job(device, **SETTINGS[name]), plain(**SETTINGS[name])
    job.steps(1)
    device.syncs.clear()
    device.waits.clear()
    job.steps(9)
    assert not device.syncs
    if SETTINGS[name].get("root_overlap", True):
        assert "MainThread" not in device.waits
    assert races(device) == []
    own.steps(10)
    assert job.optimizer.metrics()["root_updates"] == own.optimizer.metrics()["root_updates"] > 0
    for values, expected in zip(job.values(), own.values(), strict=True):
        assert torch.allclose(values, expected, rtol=1e-3, atol=1e-5)


def rolled_back(job: Job) -> None:
    """Loading an own, earlier state while jobs are under way: the stacks that they read are dropped."""
    job.steps(5)
    saved = job.optimizer.state_dict()
    job.steps(4)
    job.optimizer.load_state_dict(saved)
    job.steps(6)


def restarted(job: Job) -> None:
    """A new process that loads a state with jobs under way."""
    job.steps(5)
    saved = job.optimizer.state_dict()
    job.optimizer = job.build()
    job.optimizer.load_state_dict(saved)
    job.steps(6)


def loaded_twice(job: Job) -> None:
    job.steps(5)
    saved = job.optimizer.state_dict()
    job.optimizer.load_state_dict(saved)
    job.optimizer.load_state_dict(saved)
    job.steps(4)


def dropped(job: Job) -> None:
    """An optimizer that goes while its copies are on their way, beside another that goes on."""
    job.steps(5)
    del job.optimizer
    gc.collect()
    job.optimizer = job.build()
    job.steps(4)


def on_another_stream(job: Job) -> None:
    """A trainer whose steps change streams, which it has wait for each other, as it must."""
    module = torch.get_device_module(DEVICE)
    streams = [module.current_stream(), module.Stream(), module.Stream()]
    for number in range(9):
        stream = streams[number % 3]
        stream.wait_stream(module.current_stream())
        with module.stream(stream):
            job.steps(1)
        module.current_stream().wait_stream(stream)


def watched(job: Job) -> None:
    """Metrics and states that are asked for at every step."""
    for _ in range(8):
        job.steps(1)
        job.optimizer.metrics()
        job.optimizer.metrics(sync=True)
        job.optimizer.state_dict()


def with_a_late_group(job: Job) -> None:
    job.steps(3)
    late = torch.ones(4, 8, dtype=torch.float32, device=DEVICE)
    late.grad = torch.ones(4, 8, dtype=torch.float32, device=DEVICE)
    job.params.append(late)
    job.optimizer.add_param_group({"params": [late]})
    job.steps(6)


def without_some_gradients(job: Job) -> None:
    kept = [param.grad for param in job.params]
    for number in range(10):
        job.steps(1)
        job.params[number % 4].grad = None
        job.optimizer.step()
        for param, grad in zip(job.params, kept, strict=True):
            param.grad = grad


def begun_anew(job: Job) -> None:
    """One whose state is taken away or set to zero while jobs of its blocks are under way."""
    job.steps(5)
    job.optimizer.state.clear()
    job.steps(3)
    del job.optimizer.state[job.params[0]]
    job.steps(3)
    for state in job.optimizer.state.values():
        for key in ("exp_avg", "exp_avg_sq"):
            state[key].zero_()
    job.steps(4)


SCENARIOS = [
    rolled_back, restarted, loaded_twice, dropped, on_another_stream, watched, with_a_late_group,
    without_some_gradients, begun_anew,
]  # fmt: skip


@pytest.mark.parametrize("name", ["usual", "interval-1", "inline", "refresh"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_nor_has_anything_around_steps(device: Simulation, scenario: Callable[[Job], None], name: str) -> None:
    scenario(Job(device, **SETTINGS[name]))
    assert races(device) == []


@pytest.mark.parametrize("name", ["usual", "late", "normalized"])
@pytest.mark.parametrize("pinned", [False, True])
def test_shards_on_the_host_and_blocks_on_the_device(device: Simulation, pinned: bool, name: str) -> None:
    """As under ZeRO-Offload, whose shards and gradients are pinned."""
    job = Job(device, torch.device("cpu"), pinned, layout=Blocks(DEVICE), **SETTINGS[name])
    own = plain(**SETTINGS[name])
    job.steps(8)
    own.steps(8)
    assert races(device) == []
    for values, expected in zip(job.values(), own.values(), strict=True):
        assert torch.allclose(values, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["usual", "late", "normalized"])
def test_blocks_on_the_host_and_parameters_on_the_device(device: Simulation, name: str) -> None:
    """Gradients come by a copy that the host's statistics have to wait for."""
    job, own = Job(device, layout=Blocks(torch.device("cpu")), **SETTINGS[name]), plain(**SETTINGS[name])
    job.steps(8)
    own.steps(8)
    assert races(device) == []
    for values, expected in zip(job.values(), own.values(), strict=True):
        assert torch.allclose(values, expected, rtol=1e-3, atol=1e-5)


# Faults in the order of things, each put in for a test that must see it: by name, what is put in place of what.
def without_fence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Transfers, "fence", lambda self: None)


def without_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams.Event, "record", lambda self, stream=None: None)


def released_early(monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = Transfers.snapshot

    def early(self: Transfers, *arguments: Any) -> HostCopy:
        taken = snapshot(self, *arguments)
        self.release(taken)
        return taken

    monkeypatch.setattr(Transfers, "snapshot", early)


def snapshots_that_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The side stream copies what the training stream is still to write."""
    wait = streams.Stream.wait_stream

    def only_for_the_side(self: streams.Stream, other: streams.Stream) -> None:
        if self.actor.name != "side stream":
            wait(self, other)

    monkeypatch.setattr(streams.Stream, "wait_stream", only_for_the_side)


def installs_on_the_side(monkeypatch: pytest.MonkeyPatch) -> None:
    install = Transfers.install

    def elsewhere(self: Transfers, result: HostCopy, target: Tensor) -> None:
        with self._module.stream(self._side):
            install(self, result, target)

    monkeypatch.setattr(Transfers, "install", elsewhere)


def events_of_another_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded on the training stream, whatever stream has to be waited for."""
    record = streams.Event.record
    monkeypatch.setattr(streams.Event, "record", lambda self, stream=None: record(self, self._simulation.default))


def streams_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SimTensor, "record_stream", lambda self, stream: None)


def read_before_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostCopy, "wait", lambda self: self.tensor)


def results_used_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread writes its next root where the device still reads the last one."""
    install = Transfers.install

    def at_once(self: Transfers, result: HostCopy, target: Tensor) -> None:
        install(self, result, target)
        for free in self._results.values():
            free[:] = [HostCopy(copy.tensor) for copy in free]

    monkeypatch.setattr(Transfers, "install", at_once)


def snapshots_used_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next copy goes where a thread still reads: by its own claim to be through."""
    monkeypatch.setattr(Transfers, "_taken", taken_without_looking)


def taken_without_looking(self: Transfers, free: Any, kind: Any) -> HostCopy:
    every = self.__dict__.setdefault("every", {}).setdefault((id(free), kind), [])
    if len(every) < 2:
        every.append(HostCopy(self._new(kind)))
    every.append(every.pop(0))
    return every[-1]


def copies_to_the_host_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepWork, "_stage", lambda self, vector, later: vector.to(self.device, non_blocking=True))


MUTANTS: dict[Callable[[pytest.MonkeyPatch], None], tuple[str, Callable[[Job], None]]] = {
    without_fence: ("usual", lambda job: job.steps(9)),
    without_recording: ("usual", lambda job: job.steps(9)),
    released_early: ("interval-1", lambda job: job.steps(6)),
    snapshots_that_do_not_wait: ("usual", lambda job: job.steps(6)),
    installs_on_the_side: ("usual", lambda job: job.steps(9)),
    events_of_another_stream: ("usual", lambda job: job.steps(9)),
    streams_not_recorded: ("inline", dropped),
    read_before_it_is_there: ("inline", lambda job: job.steps(6)),
    results_used_again_at_once: ("interval-1", lambda job: job.steps(9)),
    snapshots_used_again_at_once: ("interval-1", lambda job: job.steps(9)),
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_fault_in_the_order_is_seen(
    device: Simulation, monkeypatch: pytest.MonkeyPatch, mutant: Callable[[pytest.MonkeyPatch], None]
) -> None:
    mutant(monkeypatch)
    name, scenario = MUTANTS[mutant]
    scenario(Job(device, **SETTINGS[name]))
    assert races(device)


@pytest.mark.parametrize(("where", "blocks", "pinned"), [(DEVICE, "cpu", False), (torch.device("cpu"), DEVICE, True)])
def test_a_stage_that_nothing_waits_for_is_seen(
    device: Simulation, monkeypatch: pytest.MonkeyPatch, where: torch.device, blocks: Any, pinned: bool
) -> None:
    copies_to_the_host_not_waited_for(monkeypatch)
    Job(device, where, pinned, layout=Blocks(torch.device(blocks)), **SETTINGS["late"]).steps(3)
    assert races(device)
