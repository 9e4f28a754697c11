"""What Hugging Face's Trainer is handed without DeepSpeed; tests/trainers/ has the real one."""

from __future__ import annotations

import pytest
from torch import nn

import ds_shampoo
from ds_shampoo import SettingsError


def model() -> nn.Module:
    return nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20))


def test_it_makes_an_optimizer_that_knows_the_model() -> None:
    net = model()
    made, settings = ds_shampoo.for_trainer(net, lr=2e-3, block_size=4, root_overlap=False)
    assert not {"params", "model", "optimizer_dict"} & set(settings)  # what Trainer takes for the parameters
    matrices = {"params": [p for p in net.parameters() if p.dim() > 1], "weight_decay": 0.1}
    biases = {"params": [p for p in net.parameters() if p.dim() < 2], "weight_decay": 0.0}
    optimizer = made([matrices, biases], **settings)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert [(group["lr"], group["block_size"]) for group in optimizer.param_groups] == [(2e-3, 4)] * 2
    table = optimizer.describe()
    assert "1.weight" in table
    assert "none: embedding" in table


def test_roles_have_settings_of_their_own() -> None:
    net = model()
    made, settings = ds_shampoo.for_trainer(net, lr=2e-3, embedding_lr_scale=4.0, vector_betas=(0.9, 0.99))
    table = made([{"params": list(net.parameters()), "weight_decay": 0.1}], **settings).describe()
    assert (
        "by role: embedding 4 lr, decay 0.1 (1); weight lr, decay 0.1 (2); vector lr, decay 0.1, betas 0.9, 0.99 (2)"
        in table
    )


def test_weight_decay_is_trainers() -> None:
    with pytest.raises(SettingsError, match=r"^weight_decay = 0.1: Trainer makes the param groups"):
        ds_shampoo.for_trainer(model(), lr=1e-3, weight_decay=0.1)


def test_settings_are_checked_at_once() -> None:
    with pytest.raises(SettingsError, match=r"^Shampoo setting 'block_sise' = 4: unknown key; did you mean"):
        ds_shampoo.for_trainer(model(), lr=1e-3, block_sise=4)
    with pytest.raises(SettingsError, match=r"^Shampoo setting 'lr' = -1"):
        ds_shampoo.for_trainer(model(), lr=-1)
