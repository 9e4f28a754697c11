"""torch's Muon as an optimizer that a JSON may name: what it gives to whom, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpt.model import GPT, GPTConfig
from optimizers import OptimizerError, TorchMuon, take_optimizer

SMALL = GPTConfig(layers=1, d_model=16, heads=2, context=8)


def model() -> GPT:
    torch.manual_seed(0)
    return GPT(SMALL)


def test_hidden_matrices_go_to_muon_and_everything_else_to_adamw() -> None:
    muons, alone = model(), model()
    together = TorchMuon(muons, lr=1e-2, weight_decay=0.1)
    hidden = [p for name, p in alone.named_parameters() if "attention." in name or "mlp." in name]
    others = [p for p in alone.parameters() if all(p is not q for q in hidden)]
    apart = [
        torch.optim.Muon(hidden, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95)),
    ]
    tokens = torch.randint(256, (2, 4, 8))
    for _ in range(3):
        for net, optimizers in ((muons, [together]), (alone, apart)):
            net.zero_grad()
            net(*tokens).backward()
            for optimizer in optimizers:
                optimizer.step()
    for ours, theirs in zip(muons.parameters(), alone.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_schedule_sets_the_rate_of_both() -> None:
    optimizer = TorchMuon(model(), lr=1e-2)
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
    ],
)
def test_what_it_can_not_do_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    config = {"optimizer": {"type": "TorchMuon", "params": {"lr": 1e-3}}} | change
    with pytest.raises(OptimizerError, match=message):
        take_optimizer(config, model())


def test_every_other_optimizer_is_left_to_deepspeed() -> None:
    config = {"optimizer": {"type": "Shampoo"}}
    assert take_optimizer(config, model()) is None
    assert config == {"optimizer": {"type": "Shampoo"}}
