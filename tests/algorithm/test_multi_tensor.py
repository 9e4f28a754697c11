"""The multi-tensor kernels against plain Python, one number at a time; apex's by a stand-in, since they need CUDA."""

from __future__ import annotations

import ctypes
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_shampoo import Shampoo
from ds_shampoo.algorithm import multi_tensor
from ds_shampoo.algorithm.multi_tensor import ApexKernels, TorchKernels, find_apex, kernels_for
from ds_shampoo.sharding import norms
from ds_shampoo.step import elementwise

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
NAMES = ("scale", "axpby", "l2norm", "adam")


def f32(number: float) -> float:
    return ctypes.c_float(number).value


class AmpC:
    """The kernels of `amp_C` as NVIDIA's apex defines them, in plain Python; scalars arrive as C's float.

    A launch works through the tensors of the lists, refuses what is not dense or not of one size, and forgets what
    went before an empty tensor at the end.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def multi_tensor_scale(self, chunk: int, flag: Tensor, lists: list[list[Tensor]], scale: float) -> None:
        for (x, _), (_, target) in self._launch("scale", flag, lists, 2):
            self._look(flag, x)
            write(target, [f32(scale) * a for a in x])

    def multi_tensor_axpby(
        self, chunk: int, flag: Tensor, lists: list[list[Tensor]], a: float, b: float, arg_to_check: int
    ) -> None:
        for (x, y, _), (_, _, target) in self._launch("axpby", flag, lists, 3):
            self._look(flag, x + y)
            write(target, [f32(a) * p + f32(b) * q for p, q in zip(x, y, strict=True)])

    def multi_tensor_l2norm(
        self, chunk: int, flag: Tensor, lists: list[list[Tensor]], per_tensor: bool | None
    ) -> tuple[Tensor, Tensor]:
        squares = [0.0] * len(lists[0])
        for number, ((x,), _) in enumerate(self._launch("l2norm", flag, lists, 1)):
            squares[number] = sum(a * a for a in x)
        return torch.tensor([math.sqrt(sum(squares))]), torch.tensor(squares if per_tensor else []).sqrt()

    def multi_tensor_adam(
        self,
        chunk: int,
        flag: Tensor,
        lists: list[list[Tensor]],
        lr: float,
        beta1: float,
        beta2: float,
        epsilon: float,
        step: int,
        mode: int,
        bias_correction: int,
        weight_decay: float,
    ) -> None:
        lr, beta1, beta2, epsilon, weight_decay = map(f32, (lr, beta1, beta2, epsilon, weight_decay))
        corrections = (1 - beta1**step, 1 - beta2**step) if bias_correction == 1 else (1.0, 1.0)
        for (grads, params, firsts, seconds), (_, param, first, second) in self._launch("adam", flag, lists, 4):
            for i, (g, p, m, v) in enumerate(zip(grads, params, firsts, seconds, strict=True)):
                g = g if mode == 1 else g + weight_decay * p
                firsts[i] = beta1 * m + f32(1 - beta1) * g
                seconds[i] = beta2 * v + f32(1 - beta2) * g * g
                update = firsts[i] / corrections[0] / (math.sqrt(seconds[i] / corrections[1]) + epsilon)
                params[i] = p - lr * (update + (weight_decay * p if mode == 1 else 0))
            write(param, params)
            write(first, firsts)
            write(second, seconds)

    def _launch(
        self, name: str, flag: Tensor, lists: list[list[Tensor]], depth: int
    ) -> Iterator[tuple[list[list[float]], list[Tensor]]]:
        self.calls[name] += 1
        assert flag.dtype == torch.int32
        assert flag.item() == 0, "raised by an earlier call"
        assert len(lists) == depth
        assert len({len(tensors) for tensors in lists}) == 1
        for together in zip(*lists, strict=True):
            assert all(t.is_contiguous() and t.numel() == together[0].numel() for t in together)
            assert all(t.dtype == torch.float32 for t in together)  # others have cases of their own there
        if lists[0][-1].numel():
            for together in zip(*lists, strict=True):
                yield [t.view(-1).tolist() for t in together], list(together)

    def _look(self, flag: Tensor, values: list[float]) -> None:
        if not all(map(math.isfinite, values)):
            flag.fill_(1)


def write(target: Tensor, values: list[float]) -> None:
    target.copy_(torch.tensor(values).view_as(target))


def apply(op: Callable[..., Any], flag: Tensor, lists: list[list[Tensor]], *args: Any) -> Any:
    """`multi_tensor_applier`."""
    return op(2048 * 32, flag, lists, *args)


def apex_kernels(amp_c: Any = None) -> ApexKernels:
    return ApexKernels(apply, amp_c or AmpC(), CPU)


KERNELS = {"torch": TorchKernels, "apex": apex_kernels}
every_kernel = pytest.mark.parametrize("kind", KERNELS)
one_and_several = pytest.mark.parametrize("sizes", [(5,), (7, 1, 4, 12)], ids=["one", "several"])


def numbers(sizes: tuple[int, ...], seed: int, positive: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(size, generator=generator) for size in sizes]
    return [t.abs() + 0.1 for t in found] if positive else found


def by_hand(formula: Callable[..., float], *lists: list[Tensor]) -> list[list[float]]:
    """The formula at every place of the lists' tensors."""
    return [
        [formula(*at) for at in zip(*(t.reshape(-1).tolist() for t in together), strict=True)]
        for together in zip(*lists, strict=True)
    ]


def assert_near(found: list[Tensor], expected: list[list[float]], rtol: float = 2e-6) -> None:
    for tensor, values in zip(found, expected, strict=True):
        wanted = torch.tensor(values, dtype=torch.float64)
        torch.testing.assert_close(tensor.reshape(-1).double(), wanted, rtol=rtol, atol=1e-6)


@every_kernel
@one_and_several
@pytest.mark.parametrize("into", ["starts", "ends", "others"])
@pytest.mark.parametrize("factor", [1.0, 1.7])
def test_lerp(kind: str, sizes: tuple[int, ...], into: str, factor: float) -> None:
    starts, ends, others = (numbers(sizes, seed) for seed in range(3))
    expected = by_hand(lambda s, e: factor * (s + 0.3 * (e - s)), starts, ends)
    outs = {"starts": starts, "ends": ends, "others": others}[into]
    KERNELS[kind]().lerp(starts, ends, outs, weight=0.3, factor=factor)
    assert_near(outs, expected)


@every_kernel
@one_and_several
@pytest.mark.parametrize("in_place", [True, False])
def test_scale(kind: str, sizes: tuple[int, ...], in_place: bool) -> None:
    inputs = numbers(sizes, 0)
    expected = by_hand(lambda x: 1.7 * x, inputs)
    outs = inputs if in_place else numbers(sizes, 1)
    KERNELS[kind]().scale(inputs, 1.7, outs)
    assert_near(outs, expected)


@every_kernel
@one_and_several
@pytest.mark.parametrize("beta2", [0.75, 0.999, 1.0])
@pytest.mark.parametrize("own_vectors", [True, False])
def test_divide_by_root(kind: str, sizes: tuple[int, ...], beta2: float, own_vectors: bool) -> None:
    grads, squares, outs = numbers(sizes, 0), numbers(sizes, 1, positive=True), numbers(sizes, 2)
    vectors = numbers(sizes, 3) if own_vectors else grads
    before = [[t.clone() for t in tensors] for tensors in (vectors, grads)]
    weight = 1 - beta2 if beta2 < 1 else 1.0
    moments = by_hand(lambda v, g: beta2 * v + weight * g * g, squares, grads)
    moment_tensors = [torch.tensor(values, dtype=torch.float64) for values in moments]
    expected = by_hand(lambda x, v: x / (2.5 * math.sqrt(v) + 0.01), vectors, moment_tensors)
    KERNELS[kind]().divide_by_root(vectors, grads, squares, outs, beta2=beta2, factor=2.5, eps=0.01)
    assert_near(squares, moments, rtol=2e-5)
    assert_near(outs, expected, rtol=2e-5)
    for tensors, originals in zip((vectors, grads), before, strict=True):
        assert all(map(torch.equal, tensors, originals))


@every_kernel
@pytest.mark.parametrize("grad", [0.02, 30.0])
def test_the_second_moment_is_as_exact_as_said(kind: str, grad: float) -> None:
    """From nothing it is (1 - beta2) grad², where a 1 - beta2 taken in fp32 shows in full."""
    squares, outs = [torch.zeros(1)], [torch.zeros(1)]
    KERNELS[kind]().divide_by_root(
        [torch.ones(1)], [torch.tensor([grad])], squares, outs, beta2=0.999, factor=1.0, eps=0.0
    )
    off = abs(squares[0].item() / (0.001 * f32(grad) ** 2) - 1)
    assert off < 3e-7 if kind == "torch" else 1.2e-5 < off < 1.4e-5


@every_kernel
@one_and_several
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_apply_update(kind: str, sizes: tuple[int, ...], weight_decay: float) -> None:
    params, updates = numbers(sizes, 0), numbers(sizes, 1)
    expected = by_hand(lambda p, u: p - 0.02 * (u + weight_decay * p), params, updates)
    KERNELS[kind]().apply_update(params, updates, 0.02, weight_decay)
    assert_near(params, expected)


@every_kernel
def test_parameters_of_half_precision_are_rounded_once(kind: str) -> None:
    params, updates = [t.bfloat16() for t in numbers((9, 4), 0)], numbers((9, 4), 1)
    wanted = by_hand(lambda p, u: p - 0.02 * (u + 0.1 * p), params, updates)
    KERNELS[kind]().apply_update(params, updates, 0.02, 0.1)
    for param, values in zip(params, wanted, strict=True):
        assert torch.equal(param, torch.tensor(values).bfloat16())


@every_kernel
@pytest.mark.parametrize("dense", [[True], [False], [True, False, True, False], [False, True, True]])
def test_norms(kind: str, dense: list[bool]) -> None:
    wide = numbers((60,) * len(dense), 0)
    tensors = [t.view(6, 10) if whole else t.view(6, 10)[:, 2:5] for t, whole in zip(wide, dense, strict=True)]
    expected = [[math.sqrt(sum(x * x for x in t.reshape(-1).tolist()))] for t in tensors]
    assert_near(list(KERNELS[kind]().norms(tensors)), expected)


@every_kernel
def test_an_empty_tensor_at_the_end(kind: str) -> None:
    tensors = [torch.full((4,), 3.0), torch.empty(0)]
    assert KERNELS[kind]().norms(tensors).tolist() == [6.0, 0.0]
    outs = [torch.zeros(4), torch.empty(0)]
    KERNELS[kind]().scale(tensors, 2.0, outs)
    assert outs[0].tolist() == [6.0] * 4


def test_apex_is_handed_all_that_it_takes() -> None:
    amp_c = AmpC()
    kernels = apex_kernels(amp_c)
    tensors = [numbers((5, 3), seed, positive=True) for seed in range(4)]
    kernels.lerp(tensors[0], tensors[1], tensors[0], weight=0.5)
    kernels.scale(tensors[0], 0.5, tensors[1])
    kernels.divide_by_root(*tensors, beta2=0.5, factor=1.0, eps=1.0)
    kernels.apply_update(tensors[0], tensors[1], 0.5, 0.0)
    kernels.norms([*tensors[0], torch.ones(4, 4)[:, :2]])
    assert amp_c.calls == {"axpby": 2, "scale": 1, "adam": 1, "l2norm": 1}


def test_an_infinity_stops_no_later_call() -> None:
    """The stand-in raises the flag as apex does, and minds one that is up."""
    kernels, outs = apex_kernels(), [torch.zeros(2)]
    for _ in range(2):
        kernels.scale([torch.tensor([1.0, math.inf])], 2.0, outs)
        assert outs[0].tolist() == [2.0, math.inf]


def test_several_are_rounded_as_one_by_one() -> None:
    sizes = (40, 1, 333, 17)

    def outcome(groups: list[list[int]]) -> list[Tensor]:
        lists = [numbers(sizes, seed, positive=seed == 2) for seed in range(5)]
        for group in groups:
            values, grads, squares, outs, params = ([tensors[i] for i in group] for tensors in lists)
            TorchKernels().lerp(values, grads, values, weight=0.05, factor=1.3)
            TorchKernels().scale(grads, 1.7, grads)
            TorchKernels().divide_by_root(values, grads, squares, outs, beta2=0.95, factor=3.1, eps=1e-3)
            TorchKernels().apply_update(params, outs, 0.02, 0.1)
        return [tensor for tensors in lists for tensor in tensors]

    assert all(map(torch.equal, outcome([[0, 1, 2, 3]]), outcome([[0], [1], [2], [3]])))


# The whole optimizer.


def trained(**settings: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters after some steps, and how far they went."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(12, 10), (10,), (4, 3, 3), (9, 6), ()]
    starts = [torch.randn(shape, generator=generator) for shape in shapes]
    params = [torch.nn.Parameter(start.clone()) for start in starts]
    optimizer = Shampoo(
        [(f"p{i}", p) for i, p in enumerate(params)],
        **{"lr": 0.05, "block_size": 6, "root_interval": 2, "matrix_epsilon": 1e-3} | settings,
    )
    for step in range(6):
        for number, param in enumerate(params):
            grad = torch.randn(param.shape, generator=generator)
            param.grad = None if (step, number) == (1, 1) else grad
        optimizer.step()
    ends = [param.detach() for param in params]
    return ends, [end - start for end, start in zip(ends, starts, strict=True)]


@pytest.mark.parametrize("momentum", ["before", "after"])
@pytest.mark.parametrize(
    "settings",
    [
        {"grafting": "adam", "weight_decay": 0.1},
        {"grafting": "adam", "nesterov": False, "weight_decay": 0.1, "decoupled_weight_decay": False},
        {"grafting": "rmsprop_normalized"},
        {"grafting": "adagrad"},
        {"grafting": "sgd", "nesterov": False},
    ],
    ids=lambda settings: "-".join(f"{key}={value}" for key, value in settings.items()),
)
def test_a_run_with_apex_is_a_run_with_torch(
    monkeypatch: pytest.MonkeyPatch, momentum: str, settings: dict[str, Any]
) -> None:
    by_torch, went = trained(momentum=momentum, **settings)
    amp_c = AmpC()
    for module in (elementwise, norms):
        monkeypatch.setattr(module, "kernels_for", lambda device: apex_kernels(amp_c))
    by_apex, _ = trained(momentum=momentum, **settings)
    apart = sum(float((a - b).double().square().sum()) for a, b in zip(by_apex, by_torch, strict=True))
    assert 0 < apart**0.5 <= 1e-5 * sum(float(w.double().square().sum()) for w in went) ** 0.5
    used = {"axpby", "l2norm"}
    used |= {"adam"} if settings["grafting"] not in ("adagrad", "sgd") else set()
    used |= {"scale"} if settings.get("nesterov") is False else set()
    assert set(amp_c.calls) == used


@pytest.mark.parametrize(("chunk", "together"), [(64, 0), (1 << 20, 0), (1 << 20, 50), (1 << 20, 1 << 20)])
def test_batches_change_no_bit(monkeypatch: pytest.MonkeyPatch, chunk: int, together: int) -> None:
    expected, _ = trained(momentum="after", weight_decay=0.1)
    monkeypatch.setattr(elementwise, "_limits", lambda device: (chunk, together))
    found, _ = trained(momentum="after", weight_decay=0.1)
    assert all(map(torch.equal, found, expected))


# Which apex it is.


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, str]], None]]:
    """Puts modules of these sources in front of whatever is installed, for one test."""

    def ours() -> list[str]:
        return [name for name in sys.modules if name.split(".")[0] in ("apex", "amp_C")]

    def write_modules(sources: dict[str, str]) -> None:
        for path, source in sources.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(source)

    before = {name: sys.modules.pop(name) for name in ours()}
    monkeypatch.syspath_prepend(tmp_path)
    yield write_modules
    for name in ours():
        del sys.modules[name]
    sys.modules.update(before)


NVIDIAS = {
    "apex/__init__.py": "from . import optimizers",
    "apex/optimizers.py": "class FusedAdam: pass",
    "apex/multi_tensor_apply.py": "def multi_tensor_applier(op, *args): return op(65536, *args)",
}
COMPILED = {"amp_C.py": "\n".join(f"def multi_tensor_{name}(*args): pass" for name in NAMES)}
BROKEN = {"amp_C.py": "raise ImportError('undefined symbol')"}


def test_nvidias_apex_is_found(install: Callable[[dict[str, str]], None]) -> None:
    install(NVIDIAS | COMPILED)
    applier, amp_c = find_apex()
    assert applier(lambda *args: args, "flag", ["list"], 1) == (65536, "flag", ["list"], 1)
    assert all(hasattr(amp_c, f"multi_tensor_{name}") for name in NAMES)


@pytest.mark.parametrize(
    ("sources", "reason"),
    [
        ({"apex/__init__.py": "raise ModuleNotFoundError('of that name', name='apex')"}, "of that name"),
        ({"apex/__init__.py": ""}, "another package of that name"),
        ({"apex/__init__.py": "from . import optimizers", "apex/optimizers.py": ""}, "another package of that name"),
        ({"apex/__init__.py": "import pyramid_of_giza"}, "pyramid_of_giza"),
        ({"apex/__init__.py": "raise AttributeError('session factory')"}, "session factory"),
        (NVIDIAS | BROKEN, "undefined symbol"),
    ],
    ids=["none", "Pyramid's", "with other optimizers", "lacks Pyramid", "fails", "no CUDA extensions"],
)
def test_any_other_is_not_used(install: Callable[[dict[str, str]], None], sources: dict[str, str], reason: str) -> None:
    install(COMPILED | sources)
    with pytest.raises((ImportError, AttributeError), match=reason):
        find_apex()
    kernels = kernels_for.__wrapped__(CUDA)
    assert type(kernels) is TorchKernels
    assert kernels.name.startswith("torch (NVIDIA apex is not used: ")
    assert reason in kernels.name


def test_on_a_cpu_nobody_looks_for_apex(install: Callable[[dict[str, str]], None]) -> None:
    install({"apex/__init__.py": "raise SystemExit"})
    assert kernels_for.__wrapped__(CPU).name == "torch"
    assert multi_tensor.describe([CPU]) == "elementwise step and norms: by the kernels of torch on cpu"


def test_kernels_that_pass_the_trial_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    amp_c = AmpC()
    monkeypatch.setattr(multi_tensor, "find_apex", lambda: (apply, amp_c))
    kernels = multi_tensor._apex_or_torch(CPU)
    assert isinstance(kernels, ApexKernels)
    assert kernels.name == "NVIDIA apex"
    assert set(amp_c.calls) == set(NAMES)


def takes_more(self: AmpC, *args: Any) -> None:
    raise TypeError("incompatible function arguments")


def does_nothing(self: AmpC, chunk: int, flag: Tensor, lists: list[list[Tensor]], *args: Any) -> tuple[Tensor, Tensor]:
    return torch.zeros(1), torch.zeros(len(lists[0]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fault", [takes_more, does_nothing])
def test_kernels_that_fail_the_trial_are_not(
    monkeypatch: pytest.MonkeyPatch, name: str, fault: Callable[..., Any]
) -> None:
    faulty = type("Faulty", (AmpC,), {f"multi_tensor_{name}": fault})
    monkeypatch.setattr(multi_tensor, "find_apex", lambda: (apply, faulty()))
    kernels = multi_tensor._apex_or_torch(CPU)
    assert type(kernels) is TorchKernels
    assert ("incompatible" if fault is takes_more else "other numbers than torch") in kernels.name
