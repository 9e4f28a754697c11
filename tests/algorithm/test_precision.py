"""What the fp32 products of a step may round, whatever the job around it allows."""

import contextlib
import itertools
import threading
import typing
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from ds_shampoo import Shampoo
from ds_shampoo.algorithm.precision import MatmulPrecision, in_force, matmul_precision
from ds_shampoo.algorithm.preconditioners.polar import PolarPreconditioner

by_level = pytest.mark.skipif(
    not hasattr(torch._C, "_get_fp32_precision_getter"), reason="torch before 2.9 has one setting for all"
)


@pytest.fixture(params=["highest", "high", "medium"])
def job_wide(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


def trained(precision: MatmulPrecision, preconditioner: str = "shampoo") -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(128, 96, generator=generator))
    optimizer = Shampoo(
        [weight],
        lr=1e-2,
        root_overlap=False,
        root_interval=2,
        matmul_precision=precision,
        preconditioner=preconditioner,
    )
    for _ in range(10):
        weight.grad = torch.randn(128, 96, generator=generator)
        optimizer.step()
    return weight.detach()


def test_the_job_gets_its_own_back(job_wide: str) -> None:
    with pytest.raises(ZeroDivisionError), matmul_precision("high"):
        _ = 1 / 0
    assert torch.get_float32_matmul_precision() == job_wide


@by_level
@pytest.mark.parametrize(
    ("precision", "tf32", "cuda", "cpu"),
    [("highest", False, "ieee", "ieee"), ("high", True, "tf32", "tf32"), ("medium", True, "tf32", "bf16")],
)
@pytest.mark.parametrize("job", ["tf32", "ieee", "none"])
def test_inside_both_ways_of_asking_agree(
    untouched: None, precision: MatmulPrecision, tf32: bool, cuda: str, cpu: str, job: str
) -> None:
    """As TunableOp asks, which ROCm's users switch on."""
    torch.backends.cuda.matmul.fp32_precision = job
    with matmul_precision(precision):
        assert torch.backends.cuda.matmul.allow_tf32 == tf32
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cuda.matmul.fp32_precision == cuda
        assert torch.backends.mkldnn.matmul.fp32_precision == cpu


LEVELS = ("generic", "all"), ("cuda", "all"), ("mkldnn", "all"), ("cuda", "matmul"), ("mkldnn", "matmul")
VALUES = {"generic": ("none", "ieee", "tf32", "bf16"), "cuda": ("none", "ieee", "tf32")}
VALUES["mkldnn"] = VALUES["generic"]


def level(backend: str, op: str) -> str:
    return str(torch._C._get_fp32_precision_getter(backend, op))


def set_level(backend: str, op: str, value: str) -> None:
    torch._C._set_fp32_precision_setter(backend, op, value)


def older() -> list[object]:
    """What torch's older ways of asking give, or that they refuse, as they do where a job used both."""
    found: list[object] = []
    for ask in (torch._C._get_cublas_allow_tf32, torch.get_float32_matmul_precision):
        try:
            found.append(ask())
        except RuntimeError:
            found.append("refused")
    return found


def everything() -> list[object]:
    """All that a job can learn of its settings, by asking and by changing one level and asking again.

    Changes the levels.
    """
    found: list[object] = [*older(), *(level(*at) for at in LEVELS)]
    for above in LEVELS[:3]:
        for value in ("ieee", "tf32", "none"):
            set_level(*above, value)
            found += [*older(), *(level(*at) for at in LEVELS)]
    for leaf in LEVELS[3:]:
        set_level(*leaf, "ieee")
    return [*found, *older()]


@pytest.fixture
def untouched() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    for at in LEVELS:
        set_level(*at, "none")


def ways_to_set() -> Iterator[Callable[[], None]]:
    """Every setting of every level, after every use of the older ways, and the older ways after it too."""
    words = [lambda word=word: torch.set_float32_matmul_precision(word) for word in ("highest", "high", "medium")]
    tf32 = [lambda on=on: torch._C._set_cublas_allow_tf32(on) for on in (True, False)]
    for old in (None, *words, *tf32):
        for values in itertools.product(*(VALUES[backend] for backend, _ in LEVELS)):

            def first(old: Any = old, values: tuple[str, ...] = values) -> None:
                old and old()
                for at, value in zip(LEVELS, values, strict=True):
                    set_level(*at, value)

            yield first
            if old and set(values) != {"none"} and values[3:] == ("none", "none"):

                def last(old: Any = old, values: tuple[str, ...] = values) -> None:
                    for at, value in zip(LEVELS, values, strict=True):
                        set_level(*at, value)
                    old()

                yield last


@by_level
def test_every_level_comes_back_as_the_job_left_it(untouched: None) -> None:
    precisions = itertools.cycle(typing.get_args(MatmulPrecision))
    for number, set_all in enumerate(ways_to_set()):
        torch.set_float32_matmul_precision("highest")
        for at in LEVELS:
            set_level(*at, "none")
        set_all()
        alone = everything()
        torch.set_float32_matmul_precision("highest")
        for at in LEVELS:
            set_level(*at, "none")
        set_all()
        with contextlib.suppress(ZeroDivisionError), matmul_precision(next(precisions)):
            with matmul_precision(next(precisions)):
                pass
            if number % 2:
                _ = 1 / 0
        assert everything() == alone, number


@by_level
def test_threads_do_not_undo_each_other(untouched: None) -> None:
    """The first to enter would otherwise leave first, and the second put back what the first had set."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    inside, other_done = threading.Event(), threading.Event()

    def other() -> None:
        inside.wait()
        with matmul_precision("medium"):
            other_saw.append(torch.get_float32_matmul_precision())
        other_done.set()

    other_saw: list[str] = []
    thread = threading.Thread(target=other)
    thread.start()
    with matmul_precision("highest"):
        inside.set()
        assert not other_done.wait(0.05)
        assert torch.get_float32_matmul_precision() == "highest"
    thread.join()
    assert other_saw == ["medium"]
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"


def test_what_the_job_allows_changes_no_step(job_wide: str) -> None:
    now = trained("highest")
    torch.set_float32_matmul_precision("highest")
    assert torch.equal(now, trained("highest")), job_wide


def test_rounded_products_stay_near() -> None:
    """Ten steps of norm 1 per element at most; bfloat16 inputs have a relative error of 2^-8."""
    exact, rounded = trained("highest"), trained("medium")
    assert (exact - rounded).abs().max() <= 10 * 1e-2 * 2**-8 * 4


@pytest.mark.parametrize("preconditioner", ["spectral", "polar"])
def test_iterations_are_in_bf16_under_medium_alone(preconditioner: str) -> None:
    """On any device, and within the few per cent of `test_an_iteration_in_bf16_stays_near`."""
    start = torch.randn(128, 96, generator=torch.Generator().manual_seed(0))
    exact, high, medium = (trained(precision, preconditioner) for precision in ("highest", "high", "medium"))
    moved = (exact - start).norm()
    assert (exact - high).norm() / moved < 1e-2
    assert 1e-3 < (exact - medium).norm() / moved < 0.05


@pytest.mark.parametrize(("setting", "expected"), [("highest", "highest"), ("high", "high"), ("medium", "high")])
def test_statistics_are_never_rounded_to_bfloat16(
    setting: MatmulPrecision, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise of bfloat16 would stand above the ridge."""
    seen: dict[str, set[str]] = {"statistics": set(), "directions": set()}
    update, apply = PolarPreconditioner.update, PolarPreconditioner.apply

    def updated(self: PolarPreconditioner, *arguments: Any) -> None:
        seen["statistics"].add(in_force())
        update(self, *arguments)

    def applied(self: PolarPreconditioner, *arguments: Any) -> torch.Tensor:
        seen["directions"].add(in_force())
        return apply(self, *arguments)

    monkeypatch.setattr(PolarPreconditioner, "update", updated)
    monkeypatch.setattr(PolarPreconditioner, "apply", applied)
    trained(setting, "polar")
    assert seen == {"statistics": {expected}, "directions": {setting}}
