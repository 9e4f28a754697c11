"""What the optimizer says at start, beside the table itself."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from ds_shampoo import Shampoo


class Model(nn.Module):
    """A vocabulary under a name that tells nothing, and a layer."""

    def __init__(self, words: int = 9000) -> None:
        super().__init__()
        self.words = nn.Embedding(words, 4)
        self.layer = nn.Linear(4, 4)


def warnings(caplog: pytest.LogCaptureFixture, params: Any, **settings: Any) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "ds_shampoo"):
        optimizer = Shampoo(params, **settings)
        optimizer.prepare()
        optimizer.prepare()
    return caplog.text


def test_factors_that_outweigh_their_matrices_are_named(caplog: pytest.LogCaptureFixture) -> None:
    named = [(f"layers.{i}.adapter", nn.Parameter(torch.zeros(3000, 2))) for i in range(7)]
    others = [("wide", nn.Parameter(torch.zeros(600, 300))), ("tiny", nn.Parameter(torch.zeros(300, 2)))]
    text = warnings(caplog, [*named, *others], block_size=512, max_factor_ratio=None)
    assert text.count("factors and roots take") == 1
    assert "MiB for the 164.1 KiB of layers.*.adapter (3000 x 2): a smaller max_factor_ratio" in text
    assert "wide" not in text
    assert "tiny" not in text
    assert warnings(caplog, [*named, *others], block_size=512) == ""


def test_without_a_model_what_may_be_a_vocabulary_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    text = warnings(caplog, model.named_parameters(), max_factor_ratio=4)
    assert text.count("without model=") == 1
    assert "words.weight (9000 x 4)" in text
    assert "layer" not in text
    assert warnings(caplog, model.parameters(), model=model) == ""
    assert warnings(caplog, Model(100).named_parameters()) == ""
    assert warnings(caplog, model.named_parameters(), roles={"words.*": "embedding"}) == ""


def test_roles_are_shown_with_what_holds_for_each() -> None:
    """The present settings, of each param group by itself."""
    model = Model(50)
    model.words.requires_grad_(False)
    groups = [{"params": [model.layer.weight, model.words.weight]}, {"params": [model.layer.bias], "weight_decay": 0.0}]
    optimizer = Shampoo(groups, model=model, weight_decay=0.1, vector_lr_scale=0.5, vector_eps=1e-6)
    text = optimizer.describe()
    assert "by role: weight lr, decay 0.1 (1); vector 0.5 lr, decay 0, eps 1e-06 (1)\n" in text
    assert [line.split("│")[3].strip() for line in text.splitlines() if "│" in line] == ["weight", "", "vector"]
    optimizer.param_groups[1].update({"weight_decay": 0.3, "vector_lr_scale": 2.0})
    assert "vector 2 lr, decay 0.3, eps 1e-06 (1)" in optimizer.describe()


def test_without_names_nothing_can_be_told(caplog: pytest.LogCaptureFixture) -> None:
    assert warnings(caplog, Model(100).parameters()).count("neither a model nor names") == 1
    assert "names" not in warnings(caplog, [nn.Parameter(torch.zeros(7))])
    assert warnings(caplog, [{"params": list(Model(100).parameters()), "preconditioned": False}]) == ""
