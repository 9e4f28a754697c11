"""Shampoo as an ordinary torch optimizer: every kind of parameter, saving and loading, and what it refuses."""

from __future__ import annotations

import copy
import inspect
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_shampoo import SettingsError, Shampoo, ShampooConfig
from ds_shampoo.step.work import StepWork

SETTINGS: dict[str, Any] = {"lr": 0.01, "block_size": 4, "root_interval": 3}
# Roots of the present statistics at every step.
AT_ONCE: dict[str, Any] = {**SETTINGS, "root_interval": 1, "root_overlap": False}


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def give_grad(param: Tensor, step: int) -> None:
    values = torch.randn(param.shape, generator=torch.Generator().manual_seed(100 + step))
    param.grad = values.to(param.dtype)


def run(optimizer: Shampoo, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for number, param in enumerate(params):
            give_grad(param, 1000 * number + step)
        optimizer.step()


def block_of(optimizer: Shampoo, number: int = 0) -> dict[str, Any]:
    """The state of a block of the first parameter."""
    return optimizer.state_dict()["state"][0]["blocks"][str(number)]


def copies(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def equal(a: list[nn.Parameter], b: list[nn.Parameter]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---------------------------------------------------------------- parameters of every kind


@pytest.mark.parametrize(
    ("shape", "blocks"),
    [((), 0), ((5,), 0), ((1, 5), 0), ((0, 3), 0), ((6, 5), 4), ((2, 3, 6), 2), ((8, 2, 3, 3), 2)],
    ids=str,
)
def test_shapes(shape: tuple[int, ...], blocks: int) -> None:
    param = parameter(*shape)
    before = param.detach().clone()
    optimizer = Shampoo([param], **SETTINGS)
    run(optimizer, [param], range(5))
    assert torch.isfinite(param).all()
    assert optimizer.metrics()["owned_blocks"] == optimizer.metrics()["preconditioned_blocks"] == blocks
    if param.numel():
        assert not torch.equal(param, before)


def test_a_parameter_that_misses_gradients_is_as_if_those_steps_had_not_been() -> None:
    """Also while its blocks share a stack with those of a parameter that has them."""
    here, other, silent = parameter(6, 4), parameter(6, 4, seed=1), parameter(6, 4)
    alone = copies([here])[0]
    both, single = Shampoo([here, other], **SETTINGS), Shampoo([alone, silent], **SETTINGS)
    for step in range(12):
        give_grad(other, 500 + step)
        here.grad = None
        if step % 3 != 1:
            give_grad(here, step)
            give_grad(alone, step)
            single.step()
        both.step()
    assert both.state[here]["step"] == 8
    assert torch.allclose(here, alone, rtol=1e-5, atol=1e-7)


def test_a_parameter_without_any_gradient_stays() -> None:
    used, unused, frozen = parameter(6, 4), parameter(6, 4, seed=1), parameter(6, 4, seed=2)
    frozen.requires_grad_(False)
    before = [unused.detach().clone(), frozen.detach().clone()]
    optimizer = Shampoo([used, unused, frozen], weight_decay=0.1, **SETTINGS)
    run(optimizer, [used], range(4))
    assert equal([unused, frozen], before)
    optimizer.zero_grad()
    optimizer.step()


def test_tied_weights_are_one_parameter() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(10, 6), "lm_head": nn.Linear(6, 10, bias=False)})
    model["lm_head"].weight = model["embed"].weight
    optimizer = Shampoo(model.parameters(), model=model, **SETTINGS)
    run(optimizer, [model["embed"].weight], range(3))
    assert optimizer.metrics()["owned_blocks"] == 0
    assert "embedding (embedding: diagonal)" in optimizer.describe()


def test_non_contiguous_parameters_and_gradients() -> None:
    """A transposed and a channels-last weight move exactly as their contiguous copies do."""
    transposed = nn.Parameter(torch.randn(4, 6).t())
    channels_last = nn.Parameter(torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last))
    strided = [transposed, channels_last]
    plain = [nn.Parameter(p.detach().contiguous().clone()) for p in strided]
    optimizers = [Shampoo(params, weight_decay=0.1, **SETTINGS) for params in (strided, plain)]
    for step in range(6):
        for number, (a, b) in enumerate(zip(strided, plain, strict=True)):
            give_grad(b, 10 * number + step)
            a.grad = torch.empty_like(a).copy_(b.grad)
            assert not a.grad.is_contiguous()
        for optimizer in optimizers:
            optimizer.step()
    assert equal(strided, plain)


def test_bf16_parameters_keep_fp32_state() -> None:
    low, high = parameter(8, 8, dtype=torch.bfloat16), parameter(8, 8, dtype=torch.bfloat16)
    high = nn.Parameter(high.detach().float())
    optimizers = [Shampoo([p], **SETTINGS) for p in (low, high)]
    for step in range(6):
        give_grad(low, step)
        high.grad = low.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    assert low.dtype == torch.bfloat16
    state = optimizers[0].state[low]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
    assert torch.equal(state["exp_avg"], optimizers[1].state[high]["exp_avg"])
    assert (low.float() - high).abs().max() < 0.03  # six roundings to 8 bits of values of about 1


# ---------------------------------------------------------------- groups, schedules, metrics


def test_each_group_is_as_an_optimizer_of_its_own() -> None:
    params = [parameter(6, 5), parameter(7, 4, seed=1), parameter(9, seed=2)]
    own = [
        {"lr": 0.02, "grafting": "sgd", "block_size": 3},
        {"momentum": "after", "statistics_beta": 1.0, "root_interval": 2},
        {"weight_decay": 0.3, "nesterov": False},
    ]
    apart = copies(params)
    together = Shampoo([{"params": [p], **s} for p, s in zip(params, own, strict=True)], **SETTINGS)
    singles = [Shampoo([p], **{**SETTINGS, **s}) for p, s in zip(apart, own, strict=True)]
    for step in range(8):
        for number, (a, b) in enumerate(zip(params, apart, strict=True)):
            give_grad(a, 10 * number + step)
            give_grad(b, 10 * number + step)
        together.step()
        for single in singles:
            single.step()
    assert equal(params, apart)


def test_a_group_that_is_not_preconditioned() -> None:
    on, off = parameter(6, 5), parameter(6, 5)
    adam = torch.optim.AdamW([reference := parameter(6, 5)], lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    optimizer = Shampoo(
        [{"params": [on]}, {"params": [off], "preconditioned": False}], betas=(0.9, 0.95), nesterov=False, **SETTINGS
    )
    for step in range(6):
        for param in (on, off, reference):
            give_grad(param, step)
        optimizer.step()
        adam.step()
    assert torch.allclose(off, reference, rtol=1e-5, atol=1e-6)
    assert (on - off).norm() > 0.05 * (off - parameter(6, 5)).norm()
    assert "preconditioned: false" in optimizer.describe()


def test_learning_rate_schedulers() -> None:
    scheduled, by_hand = parameter(6, 5), parameter(6, 5)
    optimizer, manual = Shampoo([scheduled], **SETTINGS), Shampoo([by_hand], **SETTINGS)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    for step in range(10):
        manual.param_groups[0]["lr"] = 0.01 * (1 + math.cos(math.pi * step / 10)) / 2
        for param, opt in ((scheduled, optimizer), (by_hand, manual)):
            give_grad(param, step)
            opt.step()
        scheduler.step()
    assert torch.allclose(scheduled, by_hand, rtol=1e-5, atol=1e-7)


def test_a_group_added_later() -> None:
    first, second = parameter(6, 5), parameter(6, 5, seed=1)
    optimizer = Shampoo([first], **SETTINGS)
    run(optimizer, [first], range(2))
    optimizer.add_param_group({"params": [second], "lr": 0.5})
    run(optimizer, [first, second], range(2, 4))
    assert optimizer.state[first]["step"] == 4
    assert optimizer.state[second]["step"] == 2


def test_metrics_count_what_happened() -> None:
    param = parameter(8, 4)
    optimizer = Shampoo([param], **SETTINGS)
    assert optimizer.metrics()["root_updates"] == 0
    run(optimizer, [param], range(5))
    metrics = optimizer.metrics()
    assert metrics["owned_blocks"] == metrics["preconditioned_blocks"] == 2
    # Begun at steps 1, 2, 3 and 5 for the first block, 1, 2 and 3 for the second; in force a step later.
    assert metrics["root_updates"] == 2 * 6
    assert (metrics["root_age_mean"], metrics["root_age_max"]) == (2.0, 2)
    assert metrics["exchange_bytes"] == metrics["roots_failed"] == 0
    run(optimizer, [param], range(5, 6))
    assert optimizer.metrics()["root_age_mean"] == 2
    phases = ("elementwise", "exchange", "statistics", "precondition")
    assert all(optimizer.metrics(sync=True)[f"{phase}_ms"] > 0 for phase in phases)


def test_names_roles_and_the_table() -> None:
    model = nn.Sequential()
    model.add_module("wte", nn.Embedding(12, 8))
    model.add_module("proj", nn.Linear(8, 8))
    model.add_module("lm_head", nn.Linear(8, 12, bias=False))
    table = Shampoo(model.parameters(), model=model, **SETTINGS).describe()
    assert table.endswith("\nelementwise step and norms: by the kernels of torch on cpu")
    assert "embedding (embedding: diagonal)" in table
    assert "output head (embedding: diagonal)" in table
    assert "4 of 4 x 4" in table
    assert "fewer than two dims above 1" in table
    by_name = Shampoo(model.named_parameters(), **SETTINGS).describe()
    assert by_name == table
    assert "param_1" in Shampoo([parameter(3, 3), parameter(4, 4)], **SETTINGS).describe()
    one_sided = Shampoo(model.parameters(), model=model, embedding="one_sided", **SETTINGS)
    assert "2 of 12 x 4" in one_sided.describe()


# ---------------------------------------------------------------- state


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("carry", [lambda state: state, through_a_file], ids=["in memory", "through a file"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"root_refresh_threshold": 0.3},
        {"root_dtype": "bfloat16"},
        {"momentum": "after"},
        {"statistics_of": "differences", "preconditioner": "polar"},
    ],
    ids=str,
)
def test_a_run_goes_on_bit_for_bit(
    carry: Callable[[dict[str, Any]], dict[str, Any]], dtype: torch.dtype, extra: dict[str, Any]
) -> None:
    params = [
        parameter(7, 6, dtype=dtype),
        parameter(5, seed=1, dtype=dtype),
        parameter(4, 2, 3, 3, seed=2, dtype=dtype),
    ]
    optimizer = Shampoo(params, **SETTINGS, **extra)
    run(optimizer, params, range(5))
    resumed = copies(params)
    other = Shampoo(resumed, **SETTINGS, **extra)
    other.load_state_dict(carry(optimizer.state_dict()))
    for (name, a), (_, b) in zip(flat(optimizer.state_dict()), flat(other.state_dict()), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
        kept = torch.bfloat16 if ".roots." in name and "root_dtype" in extra else torch.float32
        assert not isinstance(a, Tensor) or a.dtype == b.dtype == kept
    run(optimizer, params, range(5, 11))
    run(other, resumed, range(5, 11))
    assert equal(params, resumed)


def flat(value: Any, name: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [pair for key, item in value.items() for pair in flat(item, f"{name}.{key}")]
    if isinstance(value, list):
        return [pair for number, item in enumerate(value) for pair in flat(item, f"{name}.{number}")]
    return [(name, value)]


def test_a_state_from_before_the_first_step() -> None:
    params = [parameter(6, 5)]
    fresh = Shampoo(params, **SETTINGS).state_dict()
    optimizer = Shampoo(params, **SETTINGS)
    optimizer.load_state_dict(fresh)
    run(optimizer, params, range(2))


def test_states_that_do_not_fit_are_refused_before_anything_is_touched() -> None:
    params = [parameter(6, 5)]
    optimizer = Shampoo(params, **SETTINGS)
    run(optimizer, params, range(3))
    with pytest.raises(SettingsError, match="'block_size' = 3: the checkpoint was made with 4"):
        Shampoo(params, **{**SETTINGS, "block_size": 3}).load_state_dict(optimizer.state_dict())
    with pytest.raises(SettingsError, match="not a state of Shampoo"):
        optimizer.load_state_dict(torch.optim.AdamW(params).state_dict())
    state = optimizer.state_dict()
    del state["state"][0]["blocks"]["2"]
    with pytest.raises(SettingsError, match=r"lacks the factors of 1 of this rank's 4 blocks, param_0\[2\] first"):
        Shampoo(copies(params), **SETTINGS).load_state_dict(state)


def test_a_setting_that_a_checkpoint_changes_is_said(caplog: pytest.LogCaptureFixture) -> None:
    params = [parameter(6, 5)]
    state = Shampoo(params, **SETTINGS).state_dict()
    other = Shampoo(params, **{**SETTINGS, "root_interval": 7})
    other.load_state_dict(state)
    assert "'root_interval' is 3 from the checkpoint, not the present 7" in caplog.text
    assert other.param_groups[0]["root_interval"] == 3


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("built", [False, True], ids=["fresh", "built"])
def test_what_is_loaded_is_what_is_stepped(built: bool) -> None:
    """The saved settings come back, those that blocks are built by too, whatever was done before."""
    params = [parameter(7, 6)]
    optimizer = Shampoo(params, **SETTINGS, preconditioner="shampoo")
    run(optimizer, params, range(5))
    resumed = copies(params)
    other = Shampoo(resumed, **SETTINGS, preconditioner="spectral", root_dtype="bfloat16")
    if built:
        other.describe()
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["direction_rms"]  # of a release that had no such setting
    other.load_state_dict(saved)
    run(optimizer, params, range(5, 11))
    run(other, resumed, range(5, 11))
    assert equal(params, resumed)


def test_a_checkpoint_of_an_earlier_release_is_what_that_release_did() -> None:
    """It had no word for what it did always: Shampoo's direction, as long as the grafting step, of gradients."""
    params = [parameter(7, 6)]
    optimizer = Shampoo(params, **SETTINGS, preconditioner="shampoo")
    run(optimizer, params, range(5))
    saved = optimizer.state_dict()
    for key in ("preconditioner", "direction_rms", "statistics_of"):
        del saved["param_groups"][0][key]
    resumed = copies(params)
    other = Shampoo(resumed, **SETTINGS)
    other.load_state_dict(saved)
    run(optimizer, params, range(5, 11))
    run(other, resumed, range(5, 11))
    assert equal(params, resumed)


def test_the_signature_has_the_models_defaults() -> None:
    signature = inspect.signature(Shampoo.__init__).parameters
    for key, field in ShampooConfig.model_fields.items():
        assert signature[key].default == field.default, key


def test_a_group_is_added_after_loading() -> None:
    params = [parameter(4, 4)]
    optimizer = Shampoo(params, **SETTINGS)
    run(optimizer, params, range(2))
    optimizer.load_state_dict(optimizer.state_dict())
    later = [parameter(4, 4)]
    optimizer.add_param_group({"params": later})
    before = copies(later)
    run(optimizer, [*params, *later], range(2, 3))
    assert not equal(later, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"root_intervall": 5},
            r"'root_intervall' = 5: unknown key; did you mean 'root_interval'\? The keys are: batch_dims, betas",
        ),
        ({"colour": 1}, r"'colour' = 1: unknown key; The keys are"),
        ({"lr": -1.0}, r"'lr' = -1.0: Input should be greater than or equal to 0"),
        ({"lr": "0.1"}, r"'lr' = '0.1': Input should be a valid number"),
        ({"lr": math.nan}, r"'lr' = nan: Input should be a finite number"),
        ({"betas": (0.9, 1.0)}, r"'betas\[1\]' = 1.0: Input should be less than 1"),
        ({"betas": 0.9}, r"'betas' = 0.9: Input should be a valid tuple"),
        ({"grafting": "lamb"}, r"'grafting' = 'lamb': Input should be 'none', 'sgd'"),
        ({"block_size": 0}, r"'block_size' = 0: Input should be greater than or equal to 1"),
        ({"block_size": 2.5}, r"'block_size' = 2.5: Input should be a valid integer"),
        ({"nesterov": 1}, r"'nesterov' = 1: Input should be a valid boolean"),
        ({"max_factor_ratio": 0.5}, r"'max_factor_ratio' = 0.5: Input should be greater than or equal to 1"),
        ({"max_factor_ratio": 1e300}, r"'max_factor_ratio' = 1e\+300: Input should be less than or equal to 1000000"),
        ({"statistics_beta": 0.0}, r"'statistics_beta' = 0.0: Input should be greater than 0"),
        ({"matrix_epsilon": 0.5}, r"'matrix_epsilon' = 0.5: Input should be less than or equal to 0.1"),
        ({"root_method": "cholesky"}, r"'root_method' = 'cholesky': Input should be 'eigh' or 'newton'"),
        ({"root_dtype": "float16"}, r"'root_dtype' = 'float16': Input should be 'float32' or 'bfloat16'"),
        (
            {"root_dtype": "bfloat16", "root_refresh_threshold": 0.1},
            r"'root_dtype' = 'bfloat16': must be 'float32' where root_refresh_threshold is above 0, which is 0.1",
        ),
        ({"matmul_precision": "tf32"}, r"'matmul_precision' = 'tf32': Input should be 'highest', 'high' or 'medium'"),
        ({"exchange_dtype": "int8"}, r"'exchange_dtype' = 'int8'"),
        ({"root_delay": 0}, r"'root_delay' = 0: with root_overlap a root is put in force 1 to root_interval steps"),
        ({"root_delay": 11}, r"'root_delay' = 11: must be at most root_interval, which is 3"),
        ({"root_threads": 0}, r"'root_threads' = 0: Input should be greater than or equal to 1"),
        ({"root_cores": "2-"}, r"'root_cores' = '2-': must be \"auto\", a list of core numbers, or a string like"),
        ({"root_cores": [1, 1]}, r"'root_cores' = \[1, 1\]: must not name a core twice"),
        ({"root_cores": []}, r"'root_cores' = \[\]: must be"),
        ({"root_cores": [True]}, r"'root_cores' = \[True\]: must be"),
        ({"root_cores": [100000]}, r"root_cores: this process may not use the cores 100000, only"),
        ({"root_timeout": 0.0}, r"'root_timeout' = 0.0: Input should be greater than 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Shampoo([parameter(3, 3)], **settings)
    assert issubclass(SettingsError, ValueError)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"block_sice": 3}, r"'block_sice' = 3: unknown key; did you mean 'block_size'"),
        ({"block_size": -3}, r"'block_size' = -3"),
        ({"exchange_dtype": "bfloat16"}, r"'exchange_dtype' holds for the whole job"),
        ({"root_overlapp": False}, r"'root_overlapp' = False: unknown key; did you mean 'root_overlap'\? The keys"),
        ({"preconditoned": False}, r"'preconditoned' = False: unknown key; did you mean 'preconditioned'"),
        (
            {"root_dtype": "bfloat16", "root_refresh_threshold": 0.1},
            r"'root_dtype' = 'bfloat16': must be 'float32' where",
        ),
        ({"preconditioned": "no"}, r"'preconditioned' = 'no': must be true or false"),
    ],
)
def test_settings_of_a_group(group: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Shampoo([{"params": [parameter(3, 3)], **group}])


def test_tags_of_other_frameworks_stay() -> None:
    optimizer = Shampoo([{"params": [parameter(3, 3)], "wd_mult": 1.0, "name": "experts"}])
    assert optimizer.param_groups[0]["wd_mult"] == 1.0


def test_parameters_that_are_refused() -> None:
    param = parameter(3, 3)
    with pytest.raises(SettingsError, match="complex64"):
        Shampoo([nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))])
    with pytest.raises(TypeError, match="not str"):
        Shampoo(["weight"])
    with pytest.raises(ValueError, match=r"duplicate|more than one"):
        Shampoo([{"params": [param]}, {"params": [param]}])
    with pytest.raises(SettingsError, match="'w' is used twice"):
        Shampoo([("w", param), ("w", parameter(2, 2))])
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = Shampoo(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step()


def test_parameters_that_someone_replaced_are_noticed() -> None:
    optimizer = Shampoo([parameter(3, 3)])
    optimizer.param_groups[0]["params"] = [replaced := parameter(9)]
    give_grad(replaced, 0)
    with pytest.raises(RuntimeError, match=r"ds_shampoo\.initialize"):
        optimizer.step()


@pytest.mark.parametrize("grafting", ["adam", "rmsprop_normalized"])
def test_shards_on_another_device_are_staged(monkeypatch: pytest.MonkeyPatch, grafting: str) -> None:
    """As under ZeRO-Offload, where shards lie on the host and blocks on the accelerator; here copies stand for it."""
    here, staged = [parameter(6, 5), parameter(3)], [parameter(6, 5), parameter(3)]
    run(Shampoo(here, grafting=grafting, **SETTINGS), here, range(8))
    copied: list[Tensor] = []

    def stage(_: StepWork, vector: Tensor, waited_for_later: bool) -> Tensor:
        copied.append(vector.clone())
        return copied[-1]

    monkeypatch.setattr(StepWork, "_stage", stage)
    run(Shampoo(staged, grafting=grafting, **SETTINGS), staged, range(8))
    assert copied
    assert equal(here, staged)


# ---------------------------------------------------------------- bad gradients


def test_a_nan_gradient_is_rejected_counted_and_leaves_the_roots(caplog: pytest.LogCaptureFixture) -> None:
    param = parameter(4, 4)
    optimizer = Shampoo([param], **AT_ONCE, max_root_failures=2)
    run(optimizer, [param], range(2))
    roots = [root.clone() for root in block_of(optimizer)["roots"].values()]
    param.grad = torch.full_like(param, math.nan)
    optimizer.step()
    assert optimizer.metrics()["roots_rejected"] == 2
    assert optimizer.metrics()["preconditioned_blocks"] == 1
    after = block_of(optimizer)["roots"].values()
    assert all(torch.equal(a, b) for a, b in zip(roots, after, strict=True))
    param.grad = torch.full_like(param, math.nan)
    optimizer.step()
    assert optimizer.metrics()["preconditioned_blocks"] == 0
    assert "param_0[0]" in caplog.text
    give_grad(param, 5)
    optimizer.step()
    assert optimizer.metrics()["preconditioned_blocks"] == 1
    assert optimizer.metrics()["statistics_restarted"] == 2


def test_zero_gradients_change_nothing() -> None:
    param = parameter(6, 5)
    before = param.detach().clone()
    optimizer = Shampoo([param], **SETTINGS)
    for _ in range(8):
        param.grad = torch.zeros_like(param)
        optimizer.step()
    assert torch.equal(param, before)
    assert optimizer.metrics()["roots_rejected"] == 0
    run(optimizer, [param], range(6))
    assert torch.isfinite(param).all()
    assert optimizer.metrics()["preconditioned_blocks"] == 4


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-5])
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"inverse_exponent_override": 1},
        {"root_refresh_threshold": 0.01},
        {"preconditioner": "spectral"},
        {"preconditioner": "polar"},
    ],
    ids=["default", "order 1", "threshold", "spectral", "polar"],
)
def test_gradients_that_vanish_for_long_and_come_back(changed: dict[str, Any], scale: float) -> None:
    weight, rng = parameter(16, 12), torch.Generator().manual_seed(1)
    optimizer = Shampoo([weight], root_interval=2, root_overlap=False, **changed)
    for step in range(240):
        present = step < 20 or step >= 200
        weight.grad = torch.randn(16, 12, generator=rng) * (scale if present else 0.0)
        optimizer.step()
        assert weight.isfinite().all()
    assert optimizer.metrics()["preconditioned_blocks"] == 1


def test_a_frozen_group_is_no_part_of_a_step() -> None:
    weight, frozen = parameter(4, 4), parameter(4, 4).requires_grad_(False)
    optimizer = Shampoo([{"params": [weight]}, {"params": [frozen]}])
    for emptied in (False, True):  # as DeepSpeed does at stage 0 in bf16
        if emptied:
            optimizer.param_groups[1]["params"] = []
        for _ in range(3):
            weight.grad = torch.ones(4, 4)
            optimizer.step()
            assert optimizer.between_steps


def test_blocks_in_a_state_are_those_in_use_and_a_deep_copy_is_another() -> None:
    weight = parameter(4, 4)
    optimizer = Shampoo([weight], root_overlap=False, root_interval=1)
    weight.grad = torch.randn(4, 4)
    optimizer.step()
    live = optimizer.state_dict()["state"][0]["blocks"]["0"]
    copied = copy.deepcopy(live)
    weight.grad = torch.randn(4, 4)
    optimizer.step()
    present = block_of(optimizer)
    for key in ("factors", "roots"):
        for number in ("0", "1"):
            assert live[key][number].data_ptr() == present[key][number].data_ptr()
            assert not torch.equal(live[key][number], copied[key][number])


def test_another_optimizers_step_count_becomes_a_number() -> None:
    weight = parameter(4, 4)
    adamw, optimizer = torch.optim.AdamW([weight]), Shampoo([weight])
    weight.grad = torch.ones(4, 4)
    adamw.step()
    state = optimizer.state_dict()
    state["state"][0].update(adamw.state_dict()["state"][0])
    assert isinstance(state["state"][0]["step"], torch.Tensor)
    optimizer.load_state_dict(state)
    assert type(optimizer.state[weight]["step"]) is int


def test_turning_preconditioning_off_changes_the_run() -> None:
    on, off = parameter(6, 5), parameter(6, 5)
    run(Shampoo([on], **SETTINGS), [on], range(8))
    never = Shampoo([off], **SETTINGS, start_preconditioning_step=100)
    run(never, [off], range(8))
    assert never.metrics()["root_updates"] == 0
    assert (on - off).norm() > 0.05 * (off - parameter(6, 5)).norm()
