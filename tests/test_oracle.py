"""The optimizer against an oracle: docs/algorithm.md written down once more, plainly, slowly, in fp64.

The oracle knows nothing of stacks, shards, chunks or panels: it loops over parameters and blocks, and takes roots by
an eigendecomposition. It shares no code with the package.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_shampoo import Shampoo

STEPS = 30

# ‖θ - θ_oracle‖ / ‖θ_oracle - θ_0‖ at every step. fp32 rounds by 6e-8; what a ridge of 1e-3 amplifies of it stays
# about 1e-6.
TOLERANCE = 1e-5

ROLES = ("embedding", "head", "vector")

DEFAULTS: dict[str, Any] = {
    "lr": 0.02,
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "weight_decay": 0.0,
    **{f"{role}_{key}": None for role in ROLES for key in ("lr_scale", "betas", "eps", "weight_decay")},
    "decoupled_weight_decay": True,
    "momentum": "before",
    "nesterov": True,
    "momentum_warmup_steps": 0,
    "momentum_warmup_start": 0.85,
    "grafting": "adam",
    "block_size": 8,
    "max_preconditioner_dim": None,
    "max_factor_ratio": 16.0,
    "merge_small_dims": True,
    "embedding": "diagonal",
    "matrix_epsilon": 1e-3,
    "preconditioner": "shampoo",
    "direction_rms": "grafting",
    "embedding_lr_scale": 1.0,
    "inverse_exponent_override": None,
    "start_preconditioning_step": 1,
    "statistics_of": "gradients",
    "statistics_beta": 0.9,
    "matmul_precision": "highest",
    "statistics_interval": 1,
    "root_interval": 3,
    "root_refresh_threshold": 0.0,
    "root_overlap": True,
    "root_delay": None,
}

SHAPES = {
    "tall.weight": (20, 12),
    "conv.weight": (6, 4, 3, 3),
    "cube.weight": (5, 9, 10),
    "wte.weight": (30, 7),
    "bias": (11,),
    "scalar": (),
    "row.weight": (1, 13),
    "head.weight": (14, 6),
}


class Oracle:
    """Shampoo on fp64 copies of named parameters."""

    def __init__(self, params: dict[str, Tensor], **settings: Any) -> None:
        self.s = {**DEFAULTS, **settings}
        self.params = {name: p.detach().double().clone() for name, p in params.items()}
        self.t = dict.fromkeys(params, 0)
        self.m = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self.v = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self.blocks = {name: self.cut(name, tuple(p.shape)) for name, p in self.params.items()}
        self.stagger()

    def stagger(self) -> None:
        """Section 3: the largest blocks first, otherwise in the order of the model, one step after the other."""
        every = [block for cut in self.blocks.values() if cut is not None for block in cut["state"]]
        every.sort(key=lambda block: -sum(len(statistic) ** 3 for statistic in block["L"]))
        for place, block in enumerate(every):
            block["place"] = place

    def cut(self, name: str, shape: tuple[int, ...]) -> dict[str, Any] | None:
        """Section 1: the merged shape, which dims are preconditioned, and the blocks as tuples of slices."""
        s = self.s
        dims = [d for d in shape if d > 1]
        if len(dims) < 2:
            return None
        vocabulary = name.startswith(("wte", "head"))
        if vocabulary and s["embedding"] == "diagonal":
            return None
        if s["merge_small_dims"]:
            i = len(dims) - 2
            while i >= 0 and len(dims) > 2:
                if dims[i] * dims[i + 1] <= s["block_size"]:
                    dims[i : i + 2] = [dims[i] * dims[i + 1]]
                i -= 1
        limit = s["max_preconditioner_dim"] or math.inf
        on = [i for i, d in enumerate(dims) if d <= limit]
        if vocabulary and s["embedding"] == "one_sided":
            on = [i for i in on if i != 0]
        if not on:
            return None
        cuts = []
        extent = [min(s["block_size"], d) if i in on else d for i, d in enumerate(dims)]
        longest = max(on, key=lambda i: extent[i])
        measure = math.inf if s["max_factor_ratio"] is None else s["max_factor_ratio"]
        measure *= math.prod(extent) / extent[longest]
        for i, d in enumerate(dims):
            size = s["block_size"] if i in on else d
            if i == longest and extent[i] > measure:
                size = math.floor(measure)
            cuts.append([slice(a, min(a + size, d)) for a in range(0, d, size)])
        places = list(itertools.product(*cuts))
        state = [
            {"L": [torch.zeros(b[i].stop - b[i].start, b[i].stop - b[i].start).double() for i in on], "n": 0}
            for b in places
        ]
        for block in state:
            block["X"], block["A0"], block["coming"] = [None] * len(on), [None] * len(on), None
        return {"shape": dims, "on": on, "places": places, "state": state}

    def step(self, grads: dict[str, Tensor | None]) -> None:
        for name, grad in grads.items():
            if grad is not None:
                self.step_one(name, grad.double())

    def step_one(self, name: str, g: Tensor) -> None:
        s, p = self.s, self.params[name]
        lr, decay = s["lr"], self.own(name, "weight_decay")
        if self.role(name):
            lr *= s[f"{self.role(name)}_lr_scale"] or 1
        self.t[name] += 1
        t = self.t[name]
        b1 = self.beta1(name, t)
        if not s["decoupled_weight_decay"]:
            g = g + decay * p
        if s["momentum"] == "before":
            self.m[name] = b1 * self.m[name] + (1 - b1) * g
            x = self.unbiased(name, g, t)
        else:
            x = g
        u = self.grafting(name, g, x, t)
        if self.blocks[name] is not None:
            u = self.precondition(name, g, x, u, t)
        if s["momentum"] == "after":
            self.m[name] = b1 * self.m[name] + (1 - b1) * u
            u = self.unbiased(name, u, t)
        if s["decoupled_weight_decay"]:
            p = p * (1 - lr * decay)
        self.params[name] = p - lr * u

    def role(self, name: str) -> str | None:
        """Section 5: whose settings a parameter has."""
        if name.startswith(("wte", "head")):
            return "embedding" if name.startswith("wte") else "head"
        return "vector" if self.blocks[name] is None else None

    def own(self, name: str, key: str) -> Any:
        """A parameter's setting: its role's, or where that has none the group's."""
        found = None if self.role(name) is None else self.s[f"{self.role(name)}_{key}"]
        return self.s[key] if found is None else found

    def unbiased(self, name: str, value: Tensor, t: int) -> Tensor:
        m = self.m[name]
        if self.s["nesterov"]:
            b1 = self.beta1(name, t + 1)
            return (b1 * m + (1 - b1) * value) / (1 - math.prod(self.beta1(name, i) for i in range(1, t + 2)))
        return m / (1 - math.prod(self.beta1(name, i) for i in range(1, t + 1)))

    def beta1(self, name: str, t: int) -> float:
        b1, warmup, start = self.own(name, "betas")[0], self.s["momentum_warmup_steps"], self.s["momentum_warmup_start"]
        return float(min(b1, start) + (b1 - min(b1, start)) * (t - 1) / warmup) if t <= warmup else float(b1)

    def grafting(self, name: str, g: Tensor, x: Tensor, t: int) -> Tensor:
        method, b2, eps = self.s["grafting"], self.own(name, "betas")[1], self.own(name, "eps")
        if method.endswith("_normalized"):
            g, x, method = self.normalized(name, g), self.normalized(name, x), method.removesuffix("_normalized")
        if method in ("none", "sgd"):
            return x
        if method == "adagrad":
            self.v[name] = self.v[name] + g**2
            return x / (self.v[name].sqrt() + eps)
        self.v[name] = b2 * self.v[name] + (1 - b2) * g**2
        v = self.v[name] / (1 - b2**t) if method == "adam" else self.v[name]
        return x / (v.sqrt() + eps)

    def normalized(self, name: str, value: Tensor) -> Tensor:
        blocks = self.blocks[name]
        out = value.clone()
        parts = [out] if blocks is None else [out.view(blocks["shape"])[place] for place in blocks["places"]]
        for part in parts:
            norm = part.norm()
            if norm > 0:
                part /= norm
        return out

    def precondition(self, name: str, g: Tensor, x: Tensor, a: Tensor, t: int) -> Tensor:
        s, blocks = self.s, self.blocks[name]
        assert blocks is not None
        g, x, u = g.view(blocks["shape"]), x.reshape(blocks["shape"]), a.clone().view(blocks["shape"])
        b = s["statistics_beta"]
        for place, block in zip(blocks["places"], blocks["state"], strict=True):
            if (t - 1) % s["statistics_interval"] == 0:
                block["n"] += 1
                for k, i in enumerate(blocks["on"]):
                    folded = g[place] - block.get("G0", 0) if s["statistics_of"] == "differences" else g[place]
                    rows = folded.movedim(i, 0).flatten(1)
                    block["L"][k] = b * block["L"][k] + (1 - b if b < 1 else 1) * rows @ rows.T
                block["G0"] = g[place]
            start = s["start_preconditioning_step"]
            if t < start:
                continue
            self.install(block, t)
            if t == start - 1 + self.boundary(t - start + 1, block["place"]):
                p = math.ceil({"shampoo": 4, "spectral": 8, "polar": 2.5}[s["preconditioner"]] * len(blocks["on"])) / 2
                roots = [self.root(block, k, p) for k in range(len(blocks["on"]))]
                delay = min(self.delay(), max(1, (t - start + 1) // 4))
                block["coming"] = (t + delay, roots)
                self.install(block, t)
            if s["preconditioner"] == "shampoo" and any(root is None for root in block["X"]):
                continue
            d = self.rooted(block, blocks["on"], x[place])
            if s["preconditioner"] == "spectral":
                d = self.rooted(block, blocks["on"], orthogonal(d))
            if s["preconditioner"] == "polar":
                d = flattened(d)
            if s["direction_rms"] != "grafting":
                d = d * s["direction_rms"] * d.numel() ** 0.5 / d.norm()
            elif s["grafting"] != "none":
                d = d * (u[place].norm() / d.norm()) if d.norm() > 0 else torch.zeros_like(d)
            u[place] = d
        return u.view(a.shape)

    def rooted(self, block: dict[str, Any], on: list[int], d: Tensor) -> Tensor:
        for root, i in zip(block["X"], on, strict=True):
            if root is not None:
                d = torch.tensordot(root, d, dims=([1], [i])).movedim(0, i)
        return d

    def delay(self) -> int:
        if self.s["root_delay"] is not None:
            return int(self.s["root_delay"])
        return math.ceil(self.s["root_interval"] / 2) if self.s["root_overlap"] else 0

    def boundary(self, k: int, place: int) -> int:
        """Section 3: the block's in the round of the k-th step."""
        interval, r = self.s["root_interval"], 1
        while (after := r + min(interval, math.ceil(r / 2))) <= k:
            r = after
        m = max(1, math.floor(0.618 * interval))
        while any(m % d == 0 and interval % d == 0 for d in range(2, m + 1)):
            m += 1
        return r + math.floor((after - r) * (place * m % interval) / interval)

    def install(self, block: dict[str, Any], t: int) -> None:
        if block["coming"] is not None and t >= block["coming"][0]:
            block["X"], block["coming"] = block["coming"][1], None

    def root(self, block: dict[str, Any], k: int, p: float) -> Tensor | None:
        s = self.s
        p = s["inverse_exponent_override"] or p
        b, former = s["statistics_beta"], block["A0"][k]
        a = block["L"][k] / (1 - b ** block["n"] if b < 1 else 1)
        if not a.any():
            return block["X"][k]
        near = s["root_refresh_threshold"]
        if near > 0 and former is not None and (a / a.norm() - former / former.norm()).norm() < near:
            block["A0"][k] = former * (a.norm() / former.norm())
            return block["X"][k] * (a.norm() / former.norm()) ** (-1 / p)
        w, q = torch.linalg.eigh(a)
        block["A0"][k] = a
        return q @ torch.diag((w + s["matrix_epsilon"] * w[-1]) ** (-1 / p)) @ q.T


def orthogonal(d: Tensor) -> Tensor:
    """Five Newton-Schulz steps, by what they do to singular values."""
    u, s, vh = torch.linalg.svd(d.flatten(1), full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u @ torch.diag(s) @ vh).view(d.shape)


def flattened(d: Tensor) -> Tensor:
    """Three cubic steps, by what they do to singular values; coefficients worked out apart from the package."""
    u, s, vh = torch.linalg.svd(d.flatten(1), full_matrices=False)
    s = s / (s**4).sum() ** 0.25
    low, high = 0.05, 1.0
    for _ in range(3):
        peak = ((low**2 + low * high + high**2) / 3) ** 0.5
        a, c = 3 * peak**2, 1.0  # of equal values at both ends; its derivative vanishes at the peak
        end, top = a * low - c * low**3, a * peak - c * peak**3
        middle = (end + top) / 2
        s = (a * s - c * s**3) / middle
        low, high = end / middle, top / middle
    return (u @ torch.diag(s) @ vh).view(d.shape)


def gradients(step: int) -> dict[str, Tensor]:
    """Gradients with a structure to learn: a fixed low-rank part, noise, and a scale that changes over the run."""
    out = {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        fixed = torch.Generator().manual_seed(number)
        noise = torch.Generator().manual_seed(1000 * (step + 1) + number)
        scale = torch.logspace(0, -2, shape[0] if shape else 1).view(-1, *(1,) * (max(len(shape), 1) - 1))
        mean = torch.randn(shape, generator=fixed)
        value = (mean * 0.5 + torch.randn(shape, generator=noise)) * scale.view(scale.shape if shape else ())
        out[name] = value * (1 + 0.5 * math.sin(step))
    return out


def follow(settings: dict[str, Any], package_only: dict[str, Any] | None = None) -> tuple[float, Shampoo]:
    """Both take the same 30 steps; returns the largest distance on the way, over all parameters together."""
    start = {name: torch.randn(shape, generator=torch.Generator().manual_seed(7)) for name, shape in SHAPES.items()}
    params = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
    chosen = {**DEFAULTS, **settings}
    optimizer = Shampoo(params.items(), **chosen, **(package_only or {}))
    oracle = Oracle(start, **settings)
    worst = 0.0
    for step in range(STEPS):
        grads = gradients(step)
        for name, p in params.items():
            p.grad = grads[name].clone()
        optimizer.step()
        oracle.step(grads)
        apart = sum(float((params[n].detach().double() - q).norm()) ** 2 for n, q in oracle.params.items()) ** 0.5
        moved = sum(float((q - start[n].double()).norm()) ** 2 for n, q in oracle.params.items()) ** 0.5
        worst = max(worst, apart / moved)
    assert optimizer.metrics()["preconditioned_blocks"] > 0
    assert optimizer.metrics()["root_fallbacks"] == 0
    return worst, optimizer


METHODS = ["none", "sgd", "adagrad", "rmsprop", "adam"] + [
    f"{method}_normalized" for method in ("sgd", "adagrad", "rmsprop", "adam")
]


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("momentum", ["before", "after"])
@pytest.mark.parametrize("grafting", METHODS)
def test_grafting_and_momentum(grafting: str, momentum: str, nesterov: bool) -> None:
    # Steps of norm 1 per block need a larger rate to move weights of size 1 by more than their own rounding.
    lr = 0.3 if grafting == "sgd_normalized" else DEFAULTS["lr"]
    worst, _ = follow({"grafting": grafting, "momentum": momentum, "nesterov": nesterov, "lr": lr})
    assert worst <= TOLERANCE


@pytest.mark.parametrize(
    "settings",
    [
        {"statistics_beta": 0.5},
        {"statistics_beta": 1.0},
        {"statistics_beta": 1.0, "grafting": "adagrad", "statistics_interval": 4},
        {"statistics_interval": 3, "root_interval": 5},
        {"start_preconditioning_step": 7, "root_interval": 4},
        {"root_interval": 1},
        {"root_overlap": False},
        {"root_overlap": False, "root_delay": 2},
        {"root_delay": 1},
        {"root_delay": 3},
        {"root_interval": 10, "root_delay": 10},
        {"root_interval": 25, "root_delay": 4},
        {"root_interval": 25, "root_delay": 13},
        {"embedding": "one_sided"},
        {"embedding": "blocked"},
        {"max_preconditioner_dim": 9},
        {"max_preconditioner_dim": 9, "embedding": "one_sided"},
        {"max_factor_ratio": 1.0, "block_size": 30, "embedding": "blocked"},
        {"max_factor_ratio": 1.5, "block_size": 30, "embedding": "one_sided", "merge_small_dims": False},
        {"inverse_exponent_override": 3},
        {"preconditioner": "spectral"},
        {"preconditioner": "spectral", "direction_rms": 0.2, "momentum": "after"},
        {"preconditioner": "spectral", "embedding": "one_sided", "block_size": 40, "merge_small_dims": False},
        {"preconditioner": "spectral", "inverse_exponent_override": 4, "grafting": "none"},
        {"preconditioner": "polar"},
        {"preconditioner": "polar", "direction_rms": 0.2, "momentum": "after"},
        {"preconditioner": "polar", "embedding": "one_sided", "block_size": 40, "merge_small_dims": False},
        {"preconditioner": "polar", "inverse_exponent_override": 2, "grafting": "none"},
        {"direction_rms": 0.3},
        {"statistics_of": "differences"},
        {"statistics_of": "differences", "preconditioner": "polar", "statistics_interval": 3},
        {"momentum_warmup_steps": 12, "momentum_warmup_start": 0.3},
        {"momentum_warmup_steps": 40, "momentum": "after", "nesterov": False},
        {"momentum_warmup_steps": 5, "betas": (0.5, 0.9)},
        {"block_size": 5},
        {"block_size": 64},
        {"block_size": 40, "merge_small_dims": False},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": False},
        {"betas": (0.0, 0.99), "nesterov": False},
        {"matrix_epsilon": 1e-2, "eps": 1e-3},
        {"embedding_lr_scale": 4.0, "head_lr_scale": 0.3, "vector_lr_scale": 0.5},
        {
            "embedding_lr_scale": 3.0,
            "embedding_betas": (0.8, 0.9),
            "embedding_weight_decay": 0.2,
            "embedding": "one_sided",
            "head_eps": 1e-2,
            "head_betas": (0.5, 0.9),
            "momentum": "after",
            "vector_lr_scale": 2.0,
            "vector_weight_decay": 0.3,
            "vector_betas": (0.9, 0.5),
            "vector_eps": 1e-3,
        },
        {
            "decoupled_weight_decay": False,
            "weight_decay": 0.1,
            "embedding_weight_decay": 0.0,
            "embedding_lr_scale": 0.5,
            "vector_weight_decay": 0.3,
            "grafting": "rmsprop_normalized",
        },
    ],
    ids=lambda settings: "-".join(f"{key}={value}" for key, value in settings.items()),
)
def test_settings(settings: dict[str, Any]) -> None:
    worst, _ = follow(settings)
    assert worst <= TOLERANCE


def test_newton() -> None:
    worst, _ = follow({"block_size": 6}, {"root_method": "newton"})
    assert worst <= TOLERANCE


@pytest.mark.parametrize("delay", [0, 1, 3])
def test_adaptive_refresh(delay: int) -> None:
    worst, optimizer = follow({"root_refresh_threshold": 0.25, "root_overlap": delay > 0, "root_delay": delay})
    assert worst <= TOLERANCE
    assert optimizer.metrics()["roots_skipped"] > 0


def test_the_default_ridge() -> None:
    """Within a ridge of 1e-6 the rounding of fp32 statistics shows; see TOLERANCE."""
    worst, _ = follow({"matrix_epsilon": 1e-6})
    assert worst <= 1e-3


def test_the_oracle_notices_a_wrong_exponent() -> None:
    """A test that can't fail proves nothing: another root's order is far outside the tolerance."""
    worst, _ = follow({}, {})
    params = {"tall.weight": torch.nn.Parameter(torch.ones(SHAPES["tall.weight"]))}
    start = {name: p.detach().clone() for name, p in params.items()}
    optimizer = Shampoo(params.items(), **{**DEFAULTS, "inverse_exponent_override": 5})
    oracle = Oracle(start)
    for step in range(5):
        grads = {"tall.weight": gradients(step)["tall.weight"]}
        params["tall.weight"].grad = grads["tall.weight"].clone()
        optimizer.step()
        oracle.step(grads)
    apart = (params["tall.weight"].detach().double() - oracle.params["tall.weight"]).norm()
    moved = (oracle.params["tall.weight"] - start["tall.weight"].double()).norm()
    assert apart / moved > 1000 * max(worst, 1e-7)
