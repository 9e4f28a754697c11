"""The optimizer of a trial: a direction for the hidden matrices, AdamW at rates of their own for the rest."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from benchmarks.directions.formulas import corrected_root, eigenbasis, inverse_root, polar
from benchmarks.workload import hidden_matrices
from ds_shampoo import Shampoo
from ds_shampoo.algorithm.momentum import MomentumSchedule

if TYPE_CHECKING:
    from benchmarks.directions.trial import Trial

# The norm that gradients are clipped to.
CLIP = 1.0
# Where a momentum begins that warms up.
MOMENTUM_START = 0.85
# Steps with roots besides those of the interval.
EARLY = (2, 3, 5, 8, 12, 16, 22, 32, 45)


class Prototype:
    """All parameters of a model under one trial's settings."""

    def __init__(self, model: nn.Module, trial: Trial) -> None:
        self.trial, self.seconds = trial, 0.0
        self.parameters = list(model.parameters())
        matrices = hidden_matrices(model)
        taken = {id(p) for p in matrices.values()}
        by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
        if trial.direction != "adam":
            for matrix in matrices.values():
                by_shape.setdefault(tuple(matrix.shape), []).append(matrix)
        self.stacks = [Stack(same, trial) for same in by_shape.values()]
        if trial.statistics == "tokens":
            modules = {id(m.weight): m for m in model.modules() if isinstance(m, nn.Linear)}
            for stack in self.stacks:
                stack.watch([modules[id(matrix)] for matrix in stack.matrices])
        self.rest = []
        for name, p in model.named_parameters():
            if id(p) in taken and trial.direction != "adam":
                continue
            if id(p) in taken:
                scale, decay = 1.0, trial.weight_decay
            elif "embedding" in name:
                scale, decay = trial.embedding, 0.0
            elif "head" in name and p.ndim == 2:
                scale, decay = trial.head, 0.0
            else:
                scale, decay = trial.vector, 0.0
            self.rest.append(Adam(p, scale, decay))

    def take_micro_batch(self) -> None:
        """Statistics of the micro-batch's own gradient, where the trial wants them."""
        if self.trial.statistics in ("micro", "noise", "signed"):
            start = time.thread_time()
            for stack in self.stacks:
                stack.take_micro_batch()
            self.seconds += time.thread_time() - start

    @torch.no_grad()
    def step(self, step: int, rate: float) -> None:
        """One step, counted from 0, at `rate` of the peak rates."""
        start = time.thread_time()
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in self.parameters]))
        clip = (CLIP / (norm + 1e-6)).clamp_max(1.0)
        for p in self.parameters:
            p.grad.mul_(clip)
        for stack in self.stacks:
            stack.step(step, self.trial.lr * rate, float(clip))
        for adam in self.rest:
            adam.step(step, self.trial.lr * rate, self.trial)
        for p in self.parameters:
            p.grad = None
        self.seconds += time.thread_time() - start


class Packaged:
    """The package's own optimizer under one trial's settings, but for exponents: direction "ds:polar", say."""

    def __init__(self, model: nn.Module, trial: Trial) -> None:
        self.trial, self.seconds = trial, 0.0
        self.parameters = list(model.parameters())
        roles = {f"{role}_lr_scale": getattr(trial, role) for role in ("embedding", "head", "vector")}
        undecayed = {f"{role}_weight_decay": 0.0 for role in ("embedding", "head", "vector")}
        self.optimizer = Shampoo(
            self.parameters,
            model=model,
            preconditioner=trial.direction.partition(":")[2],
            momentum_warmup_steps=trial.momentum_warmup,
            momentum_warmup_start=MOMENTUM_START,
            direction_rms=trial.rms if trial.rms > 0 else "grafting",
            weight_decay=trial.weight_decay,
            betas=(trial.momentum, trial.beta2),
            eps=trial.eps,
            block_size=trial.block,
            statistics_of={"mean": "gradients", "difference": "differences"}[trial.statistics],
            statistics_beta=trial.statistics_beta,
            matrix_epsilon=trial.ridge,
            root_interval=trial.interval,
            matmul_precision=trial.precision,
            root_threads=1,
            **roles,
            **undecayed,
        )

    def take_micro_batch(self) -> None:
        """Nothing: the package sees a step's gradient alone."""

    def step(self, step: int, rate: float) -> None:
        """One step, counted from 0, at `rate` of the peak rates."""
        start = time.thread_time()
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = self.trial.lr * rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds += time.thread_time() - start


class Adam:
    """AdamW on one parameter."""

    def __init__(self, p: nn.Parameter, scale: float, decay: float) -> None:
        self.p, self.scale, self.decay = p, scale, decay
        self.m, self.v = torch.zeros_like(p), torch.zeros_like(p)

    def step(self, step: int, lr: float, trial: Trial) -> None:
        g, lr = self.p.grad, lr * self.scale
        self.m.lerp_(g, 1 - trial.beta1)
        self.v.mul_(trial.beta2).addcmul_(g, g, value=1 - trial.beta2)
        if trial.nesterov_rest:
            m = g.lerp(self.m, trial.beta1) / (1 - trial.beta1 ** (step + 2))
        else:
            m = self.m / (1 - trial.beta1 ** (step + 1))
        v = self.v / (1 - trial.beta2 ** (step + 1))
        self.p.mul_(1 - lr * self.decay).sub_(lr * m / (v.sqrt() + trial.eps))


class Stack:
    """The hidden matrices of one shape, cut into blocks where the direction has some."""

    def __init__(self, matrices: list[nn.Parameter], trial: Trial) -> None:
        self.matrices, self.trial = matrices, trial
        self.m = torch.zeros(len(matrices), *matrices[0].shape)
        rows, columns = matrices[0].shape
        whole = trial.direction == "muon"
        self.rows, self.columns = (rows, columns) if whole else (min(rows, trial.block), min(columns, trial.block))
        n = len(matrices) * rows * columns // self.rows // self.columns
        self.left, self.right = torch.zeros(n, self.rows, self.rows), torch.zeros(n, self.columns, self.columns)
        self.exponents = trial.exponent, trial.exponent if trial.exponent_right < 0 else trial.exponent_right
        self.extra = torch.zeros_like(self.left), torch.zeros_like(self.right)
        self.roots: tuple[Tensor, Tensor] | None = None
        self.pending: list[tuple[int, tuple[Tensor, Tensor]]] = []
        self.row_square = torch.zeros(n, self.rows, 1)
        self.before: Tensor | None = None
        self.signed: Tensor | None = None
        self.signs = torch.Generator().manual_seed(trial.seed)
        self.norms = [p.detach().norm() for p in matrices]

    def watch(self, layers: list[nn.Linear]) -> None:
        """Sums the second moments of a sample of tokens' inputs and output gradients from now on (K-FAC's factors)."""
        self.ins, self.outs = (torch.zeros(len(layers), d, d) for d in (layers[0].in_features, layers[0].out_features))
        self.tokens_in, self.tokens_out = 0, 0
        every = self.trial.sampled

        def see(number: int, layer: nn.Linear) -> None:
            def forward(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                if torch.is_grad_enabled():
                    own = args[0].detach().flatten(0, -2)[::every].float()
                    self.ins[number].addmm_(own.mT, own)
                    self.tokens_in += len(own)

            def backward(_: nn.Module, __: object, grads: tuple[Tensor, ...]) -> None:
                own = grads[0].detach().flatten(0, -2)[::every].float()
                self.outs[number].addmm_(own.mT, own)
                self.tokens_out += len(own)

            layer.register_forward_pre_hook(forward)
            layer.register_full_backward_hook(backward)

        for number, layer in enumerate(layers):
            see(number, layer)

    def token_statistics(self) -> tuple[Tensor, Tensor]:
        """The diagonal blocks of what was watched, as each block has them."""
        rows, columns = self.m.shape[1] // self.rows, self.m.shape[2] // self.columns

        def blocks(whole: Tensor, parts: int, size: int) -> Tensor:
            return torch.stack(
                [whole[:, i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(parts)], 1
            )

        left = blocks(self.outs, rows, self.rows).unsqueeze(2).expand(-1, -1, columns, -1, -1).flatten(0, 2)
        right = blocks(self.ins, columns, self.columns).unsqueeze(1).expand(-1, rows, -1, -1, -1).flatten(0, 2)
        found = left.clone(), right.clone()
        self.ins.zero_(), self.outs.zero_()
        return found

    def cut(self, whole: Tensor) -> Tensor:
        """[matrices, rows, columns] as blocks [n, rows, columns]."""
        count, rows, columns = whole.shape
        parts = whole.view(count, rows // self.rows, self.rows, columns // self.columns, self.columns)
        return parts.transpose(2, 3).reshape(-1, self.rows, self.columns)

    def join(self, blocks: Tensor) -> Tensor:
        count, rows, columns = self.m.shape
        parts = blocks.view(count, rows // self.rows, columns // self.columns, self.rows, self.columns)
        return parts.transpose(2, 3).reshape(count, rows, columns)

    @torch.no_grad()
    def take_micro_batch(self) -> None:
        grad = torch.stack([p.grad for p in self.matrices])
        own = grad - self.before if self.before is not None else grad
        self.before = grad
        if self.trial.statistics == "signed":
            sign = 2.0 * float(torch.randint(2, (), generator=self.signs)) - 1.0
            self.signed = sign * own if self.signed is None else self.signed + sign * own
            return
        own = self.cut(own)
        self.extra[0].add_(own @ own.mT)
        self.extra[1].add_(own.mT @ own)

    def step(self, step: int, lr: float, clip: float) -> None:
        t = self.trial
        g = torch.stack([p.grad for p in self.matrices])
        mu = MomentumSchedule(t.momentum, t.momentum_warmup, MOMENTUM_START).at(step + 1)
        if t.direction != "muon":
            self.gather_statistics(g, step, clip)
        self.m.lerp_(g, 1 - mu)
        x = self.cut(g.lerp(self.m, mu))
        d = self.direct(x, step)
        if t.rows:
            self.row_square.lerp_(d.square().mean(2, keepdim=True), 0.05)
            d = d / self.row_square.sqrt().clamp_min(1e-10)
        d = d * (t.rms * (self.rows * self.columns) ** 0.5 / d.flatten(1).norm(dim=1).clamp_min(1e-30).view(-1, 1, 1))
        for p, own in zip(self.matrices, self.join(d), strict=True):
            p.mul_(1 - lr * t.weight_decay).sub_(own, alpha=lr)
        if t.hyperball:
            for p, norm in zip(self.matrices, self.norms, strict=True):
                p.mul_(norm / p.norm())

    def gather_statistics(self, g: Tensor, step: int, clip: float) -> None:
        t = self.trial
        if t.statistics in ("micro", "noise"):
            left, right = (value * clip**2 for value in self.extra)
            if t.statistics == "noise":
                own = self.cut(g)
                left, right = left - own @ own.mT / t.micro, right - own.mT @ own / t.micro
            for value in self.extra:
                value.zero_()
            self.before = None
        elif t.statistics == "tokens":
            left, right = self.token_statistics()
        else:
            own = g
            if t.statistics == "centred" and step:
                own = g - self.m / (1 - t.momentum**step)
            if t.statistics == "difference":
                own, self.before = g - self.before if self.before is not None else g, g
            if t.statistics == "signed":
                assert self.signed is not None
                own, self.signed, self.before = self.signed * clip, None, None
            own = self.cut(own)
            left, right = own @ own.mT, own.mT @ own
        beta = min(t.statistics_beta, step / (step + 1)) if t.statistics_beta < 1 else 1.0
        self.left.lerp_(left, 1 - beta)
        self.right.lerp_(right, 1 - beta)
        late = min(t.delay, (step + 1) // 4)
        if step == 0 or (step + 1) % t.interval == 0 or (t.early and step + 1 in EARLY):
            left, right = (
                eigenbasis(factor) if t.live else inverse_root(factor, exponent, t.ridge)
                for factor, exponent in zip((self.left, self.right), self.exponents, strict=True)
            )
            self.pending.append((step + late, (left, right)))
        while self.pending and self.pending[0][0] <= step:
            self.roots = self.pending.pop(0)[1]

    def direct(self, x: Tensor, step: int) -> Tensor:
        t = self.trial
        if t.direction == "muon":
            return polar(x, "quintic", 5, 0.0)
        assert self.roots is not None
        left, right = self.roots
        if t.live:
            left = corrected_root(self.left, left, self.exponents[0], t.ridge, t.live)
            right = corrected_root(self.right, right, self.exponents[1], t.ridge, t.live)
        whitened = left @ x @ right
        if t.direction == "shampoo":
            return whitened
        if t.direction == "polar":
            return polar(whitened, t.method, t.count, t.floor)
        if t.direction == "spectral":
            return left @ polar(whitened, "quintic", 5, 0.0) @ right
        raise ValueError(f"direction = {t.direction}")
