"""Optimizers that a JSON may name: what goes to whom, at which rate, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from gpt.model import GPT, GPTConfig
from optimizers import AdamWByRole, ByRole, OptimizerError, TorchMuon, settings_of, take_optimizer

SMALL = GPTConfig(layers=1, d_model=16, heads=2, context=8)


def model() -> GPT:
    torch.manual_seed(0)
    return GPT(SMALL)


def split(net: GPT) -> dict[str, list[nn.Parameter]]:
    """The parameters by what their rates go by."""
    found: dict[str, list[nn.Parameter]] = {"hidden": [], "embedding": [], "head": [], "vector": []}
    for name, p in net.named_parameters():
        part = "hidden" if p.ndim == 2 and ("attention." in name or "mlp." in name) else "vector"
        part = "embedding" if "embedding" in name else "head" if "lm_head" in name else part
        found[part].append(p)
    return found


def train(net: GPT, *optimizers: torch.optim.Optimizer) -> None:
    torch.manual_seed(1)
    tokens = torch.randint(256, (2, 4, 8))
    for _ in range(3):
        net.zero_grad()
        net(*tokens).backward()
        for optimizer in optimizers:
            optimizer.step()


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_hidden_matrices_go_to_muon_and_everything_else_to_adamw() -> None:
    muons, alone = model(), model()
    parts = split(alone)
    hidden = torch.optim.Muon(parts.pop("hidden"), lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    others = [p for part in parts.values() for p in part]
    train(muons, TorchMuon(muons, lr=1e-2, weight_decay=0.1))
    train(alone, hidden, torch.optim.AdamW(others, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95)))
    assert_equal(muons, alone)


def test_rates_betas_and_decay_by_role() -> None:
    ours, alone = model(), model()
    scales = {"embedding": 4.0, "head": 0.5, "vector": 2.0}
    settings = {"betas": (0.8, 0.9), "eps": 1e-10}
    parts = split(alone)
    hidden = torch.optim.AdamW(parts["hidden"], lr=1e-2, weight_decay=0.1, **settings)
    others = [
        torch.optim.AdamW(parts[name], lr=1e-2 * scale, weight_decay=0.2, **settings) for name, scale in scales.items()
    ]
    rates = {f"{name}_lr_scale": scale for name, scale in scales.items()}
    train(ours, AdamWByRole(ours, lr=1e-2, weight_decay=0.1, other_weight_decay=0.2, **settings, **rates))
    train(alone, hidden, *others)
    assert_equal(ours, alone)


def test_convolutions_are_adamw_s_at_the_rate_itself() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.Flatten(), nn.Linear(4, 2), nn.Linear(2, 2, bias=False))
    muon, adamw = TorchMuon(net, vector_lr_scale=3.0), AdamWByRole(net, vector_lr_scale=3.0)
    for optimizer, expected in ((muon, [2, 1.0, 1, 3.0, 1, 1.0]), (adamw, [3, 1.0, 1, 3.0])):
        found = [number for group in optimizer.param_groups for number in (len(group["params"]), group["lr_scale"])]
        assert found == expected


def momenta(optimizer: TorchMuon, steps: int) -> list[float]:
    """Muon's in each of so many steps without gradients."""
    found = []
    for _ in range(steps):
        optimizer.step()
        found.append(optimizer.param_groups[0]["momentum"])
    return found


def test_momentum_rises_to_its_end_and_goes_on_from_a_checkpoint() -> None:
    rising = TorchMuon(model(), momentum_warmup=4)
    assert momenta(rising, 5) == pytest.approx([0.875, 0.9, 0.925, 0.95, 0.95])
    assert momenta(TorchMuon(model(), momentum=0.9), 1) == [0.9]
    assert momenta(TorchMuon(model(), momentum=0.9, momentum_start=0.95, momentum_warmup=4), 1) == [0.9]
    straight, parts = model(), model()
    optimizer = TorchMuon(straight, momentum_warmup=5)
    train(straight, optimizer)
    train(straight, optimizer)
    first = TorchMuon(parts, momentum_warmup=5)
    train(parts, first)
    second = TorchMuon(parts, momentum_warmup=5)
    second.load_state_dict(first.state_dict())
    train(parts, second)
    assert_equal(straight, parts)
    assert second.param_groups[0]["momentum"] == 0.95


def test_a_schedule_sets_the_rate_of_all() -> None:
    optimizer = TorchMuon(model(), lr=1e-2, embedding_lr_scale=4.0)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    net_before = [p.clone() for group in optimizer.param_groups for p in group["params"]]
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    after = [p for group in optimizer.param_groups for p in group["params"]]
    assert all(torch.equal(a, b) for a, b in zip(net_before, after, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero_optimization": {"stage": 2}}, "ZeRO stage 0"),
        ({"bf16": {"enabled": True}}, "fp32"),
        ({"optimizer": {"type": "TorchMuon", "params": {"momentun": 0.9}}}, "momentun.*takes.*momentum"),
        ({"optimizer": {"type": "AdamWByRole", "params": {"momentum": 0.9}}}, "momentum.*takes.*head_lr_scale"),
        ({"optimizer": {"type": "TorchMuon", "params": {"head_lr_scale": -1}}}, "head_lr_scale = -1: must be at least"),
        ({"optimizer": {"type": "TorchMuon", "params": {"lr": "high"}}}, "TorchMuon: "),
        ({"optimizer": {"type": "no_such_module:Muon"}}, "No module named 'no_such_module'"),
        ({"optimizer": {"type": "optimizers:NoSuchClass"}}, "NoSuchClass"),
        ({"optimizer": {"type": "torch.optim:AdamW"}}, "must be a subclass of optimizers.ByRole"),
        ({"optimizer": {"type": ":"}}, "optimizer.type = ':'"),
    ],
)
def test_what_it_can_not_do_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    config = {"optimizer": {"type": "TorchMuon", "params": {"lr": 1e-3}}} | change
    with pytest.raises(OptimizerError, match=message):
        take_optimizer(config, model())


def test_a_class_from_elsewhere_is_built_with_the_json_s_settings() -> None:
    params = {"lr": 1e-3, "exponent": 1 / 3, "grafting": "sqrt_rows", "head_lr_scale": 0.5}
    config = {"optimizer": {"type": "benchmarks.prototypes:FacebookShampoo", "params": params}}
    optimizer = take_optimizer(config, model())
    assert type(optimizer).__name__ == "FacebookShampoo"
    assert config == {}
    hidden, head = optimizer.param_groups[0], optimizer.param_groups[2]
    assert (hidden["exponent"], hidden["grafting"], head["lr_scale"]) == (1 / 3, "sqrt_rows", 0.5)


def test_a_class_takes_what_those_take_that_it_hands_the_rest_to() -> None:
    common = settings_of(ByRole)
    assert {"lr", "weight_decay", "betas", "eps", "embedding_lr_scale", "vector_lr_scale"} < common
    assert settings_of(TorchMuon) == common | {"momentum", "momentum_start", "momentum_warmup", "nesterov", "ns_steps"}
    assert settings_of(AdamWByRole) == common


def test_every_other_optimizer_is_left_to_deepspeed() -> None:
    config = {"optimizer": {"type": "Shampoo"}}
    assert take_optimizer(config, model()) is None
    assert config == {"optimizer": {"type": "Shampoo"}}
