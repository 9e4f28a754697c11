"""What a model's library wrote on its parameters holds for plain torch too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ds_shampoo import SettingsError, Shampoo
from ds_shampoo.parameters.marks import mark_embedding_or_head


def test_a_marked_matrix_is_a_head_whatever_its_name() -> None:
    model = nn.ModuleDict({"first": nn.Linear(6, 6), "to_words": nn.Linear(6, 9)})
    assert "output head" not in Shampoo(model.parameters(), model=model).describe()
    mark_embedding_or_head(model["to_words"].weight)  # type: ignore[arg-type, index]
    for optimizer in (
        Shampoo(model.parameters(), model=model),
        Shampoo(model.named_parameters()),
        Shampoo(model.parameters()),
    ):
        (line,) = [line for line in optimizer.describe().splitlines() if "9 x 6" in line]
        assert "none: output head (embedding: diagonal)" in line


def test_megatrons_own_attribute_is_the_mark() -> None:
    model = nn.Linear(6, 9)
    model.weight.is_embedding_or_output_parameter = True  # type: ignore[attr-defined]
    assert "output head" in Shampoo(model.named_parameters()).describe()


def test_an_embedding_that_pipeline_stages_share_is_one_under_any_name() -> None:
    """Its copy is an output layer, by name and by Megatron's other mark."""
    model = nn.ModuleDict({"output_layer": nn.Linear(6, 9, bias=False)})
    mark_embedding_or_head(model["output_layer"].weight)  # type: ignore[arg-type]
    assert "none: output head" in Shampoo(model.parameters(), model=model).describe()
    model["output_layer"].weight.shared_embedding = True  # type: ignore[assignment]
    for optimizer in (Shampoo(model.parameters(), model=model), Shampoo(model.named_parameters())):
        assert "none: embedding (embedding: diagonal)" in optimizer.describe()


def test_shapes_are_read_where_zero_has_taken_the_elements_away_before_there_is_an_engine() -> None:
    model = nn.ModuleDict({"experts": nn.ParameterList([nn.Parameter(torch.zeros(3, 8, 4))]), "out": nn.Linear(4, 6)})
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]
        parameter.data = torch.empty(0)
    table = Shampoo(model.parameters(), model=model, batch_dims={"experts.*": 1}).describe()
    assert [shape for shape in ("3 x 8 x 4", "6 x 4") if f" {shape} " in table] == ["3 x 8 x 4", "6 x 4"]
    with pytest.raises(SettingsError, match=r"says 2 of 'experts.0' of shape \(3, 8, 4\)"):
        Shampoo(model.parameters(), model=model, batch_dims={"experts.*": 2})
