"""What is read of parameters before anything is known of ranks."""

from __future__ import annotations

import torch
from torch import nn

from ds_shampoo.parameters.data_parallel import _unwrapped_names, layout_for
from ds_shampoo.parameters.members import listed
from ds_shampoo.sharding.layout import WholeLayout


def test_iterators_can_be_read_again() -> None:
    model = nn.Linear(3, 2)
    for params in (
        model.parameters(),
        model.named_parameters(),
        list(model.parameters()),
        ({"params": p} for p in model.parameters()),
        [{"params": model.parameters(), "lr": 0.1}],
        [{"params": model.named_parameters()}],
    ):
        found = listed(params)
        assert str(found) == str(found)
        assert len(found) == len(list(found)) > 0
        for group in found:
            if isinstance(group, dict) and not isinstance(group["params"], torch.Tensor):
                assert len(group["params"]) == 2
    assert listed(model.weight) is model.weight
    assert listed(3) == 3


def test_names_lose_the_wrapper_and_nothing_else() -> None:
    """Also where the model has a module of its own that is called as the wrapper's is."""
    inner = nn.Module()
    inner.module = nn.Linear(2, 2)
    wrapper, outer = nn.Module(), nn.Module()
    wrapper.module, outer.net = inner, wrapper
    weight = id(inner.module.weight)
    assert _unwrapped_names(wrapper, [""])[weight, "module.module.weight"] == "module.weight"
    assert (weight, "module.weight") not in _unwrapped_names(wrapper, [""])
    assert _unwrapped_names(outer, ["net"])[weight, "net.module.module.weight"] == "net.module.weight"


def test_without_a_wrapper_nothing_is_shared() -> None:
    model = nn.Linear(3, 2)
    assert type(layout_for(model, list(model.parameters()))) is WholeLayout
    assert type(layout_for(None, list(model.parameters()))) is WholeLayout
