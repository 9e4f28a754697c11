"""What a parameter is taken for: by its module, by its name, and through what wraps it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

from ds_shampoo.algorithm.selection import Kind, Reader, Role, kinds, name_kind, plain_name, roles

VOCABULARY, WIDTH, RANK = 40, 8, 2


class Lora(nn.Module):
    """An adapter as PEFT builds it: around a linear layer, or around an embedding."""

    def __init__(self, base: nn.Module, rows: int, columns: int) -> None:
        super().__init__()
        self.base_layer = base
        if isinstance(base, nn.Embedding):
            self.lora_embedding_A = nn.ParameterDict({"default": torch.zeros(RANK, rows)})
            self.lora_embedding_B = nn.ParameterDict({"default": torch.zeros(columns, RANK)})
        else:
            self.lora_A = nn.ModuleDict({"default": nn.Linear(columns, RANK, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(RANK, rows, bias=False)})


class Saved(nn.Module):
    """PEFT's `modules_to_save`: the module as it was, and a copy that is trained."""

    def __init__(self, original: nn.Module, copy: nn.Module) -> None:
        super().__init__()
        self.original_module, self.modules_to_save = original, nn.ModuleDict({"default": copy})


class LanguageModel(nn.Module):
    """An embedding of a name that says nothing, a layer, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY)


def wrapped(name: str) -> nn.Module:
    model = LanguageModel()
    if name == "lora":
        model.words, model.layer, model.lm_head = (  # type: ignore[assignment]
            Lora(module, VOCABULARY if module is not model.layer else WIDTH, WIDTH)
            for module in (model.words, model.layer, model.lm_head)
        )
    elif name == "modules_to_save":
        model.words = Saved(model.words, nn.Embedding(VOCABULARY, WIDTH))  # type: ignore[assignment]
        model.lm_head = Saved(model.lm_head, nn.Linear(WIDTH, VOCABULARY))  # type: ignore[assignment]
    else:
        for module in (model.words, model.layer, model.lm_head):
            WRAPPERS[name](module)
    return model


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "bare": lambda module: module,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": weight_norm,
    "lora": lambda module: module,
    "modules_to_save": lambda module: module,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_stands_for_a_layer_has_its_role(wrapper: str, compiled: bool) -> None:
    model = wrapped(wrapper)
    if compiled:
        model.lm_head, model.layer = torch.compile(model.lm_head), torch.compile(model.layer)  # type: ignore[assignment]
    role = roles(model)
    expected = {"words": Role.EMBEDDING, "layer": Role.WEIGHT, "lm_head": Role.HEAD}
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and ".lora_" in name and name.startswith("layer."):
            assert role[id(parameter)] is Role.LORA, name
        elif parameter.dim() > 1:
            assert role[id(parameter)] is expected[name.split(".")[0]], name


def test_an_adapter_s_dimension_over_the_vocabulary() -> None:
    model = wrapped("lora")
    found = kinds(model)
    dims = {name: found[id(p)].vocabulary_dim for name, p in model.named_parameters() if "layer." not in name}
    assert dims["words.lora_embedding_A.default"] == -1
    assert dims["words.lora_embedding_B.default"] is None
    assert dims["lm_head.lora_A.default.weight"] is None
    assert dims["lm_head.lora_B.default.weight"] == 0


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("model.lm_head.parametrizations.weight.original1", "model.lm_head.weight"),
        ("lm_head.weight_v", "lm_head.weight"),
        ("lm_head.weight_orig", "lm_head.weight"),
        ("a.lm_head.modules_to_save.some_adapter.weight", "a.lm_head.weight"),
        ("a.words.lora_embedding_A.default", "a.words.weight"),
        ("a.q.base_layer.weight", "a.q.weight"),
        ("_orig_mod.a._orig_mod.weight", "a.weight"),
        ("a._checkpoint_wrapped_module.b", "a.b"),
        ("base_layer", "base_layer"),
        ("a.b_g", "a.b"),
        ("weight", "weight"),
        ("my_base_layer.weight", "my_base_layer.weight"),
    ],
)
def test_plain_names(name: str, plain: str) -> None:
    assert plain_name(name) == plain


@pytest.mark.parametrize(
    ("name", "shape", "role"),
    [
        ("lm_head.weight", (9, 4), Role.HEAD),
        ("lm_head.parametrizations.weight.original1", (9, 4), Role.HEAD),
        ("lm_head.modules_to_save.default.weight", (9, 4), Role.HEAD),
        ("embed_tokens.lora_embedding_A.default", (2, 9), Role.EMBEDDING),
        ("classifier.weight", (3, 4), Role.HEAD),
        ("qa_outputs.weight", (2, 4), Role.HEAD),
        ("score.weight", (3, 4), Role.HEAD),
        ("fc.weight", (3, 4), Role.HEAD),
        ("layers.0.fc.weight", (3, 4), Role.WEIGHT),
        ("layers.0.mixer.A_log", (9, 4), Role.ELEMENTWISE),
        ("layers.0.mixer.D", (9, 4), Role.ELEMENTWISE),
        ("system.D.weight", (4, 4), Role.WEIGHT),
        ("decoder.layers.0.out_proj.weight", (4, 4), Role.WEIGHT),
        ("lm_head.bias", (9,), Role.WEIGHT),
    ],
)
def test_by_name_alone(name: str, shape: tuple[int, ...], role: Role) -> None:
    assert name_kind(name, torch.zeros(shape)).role is role


def test_the_head_of_several_layers_is_the_last() -> None:
    model = nn.ModuleDict(
        {
            "classifier": nn.ModuleDict(
                {"dense": nn.Linear(4, 4), "norm": nn.LayerNorm(4), "out_proj": nn.Linear(4, 3)}
            ),
            "decoder": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]),
        }
    )
    assert [r.name for r in roles(model).values() if r is not Role.WEIGHT] == ["HEAD"]
    assert roles(model)[id(model["classifier"]["out_proj"].weight)] is Role.HEAD  # type: ignore[index]


def test_a_tied_head_is_an_embedding() -> None:
    model = LanguageModel()
    model.lm_head.weight = model.words.weight
    assert roles(model)[id(model.words.weight)] is Role.EMBEDDING


def test_a_head_that_an_inner_module_names() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.strange = nn.Linear(WIDTH, VOCABULARY)

        def get_output_embeddings(self) -> nn.Module:
            return self.strange

    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Inner())
    assert [role for role in roles(model).values() if role is not Role.WEIGHT] == [Role.HEAD]


def test_depthwise_convolutions() -> None:
    model = nn.ModuleDict(
        {
            "depthwise": nn.Conv1d(6, 6, 4, groups=6),
            "wider": nn.Conv2d(6, 12, 3, groups=6),
            "normed": weight_norm_of(nn.Conv1d(6, 6, 4, groups=6)),
            "grouped": nn.Conv2d(6, 6, 3, groups=3),
            "first": nn.Conv1d(1, 6, 4),
        }
    )
    role = roles(model)
    found = {name.split(".")[0] for name, p in model.named_parameters() if role[id(p)] is Role.DEPTHWISE}
    assert found == {"depthwise", "wider", "normed"}


def weight_norm_of(module: nn.Module) -> nn.Module:
    return parametrizations.weight_norm(module)


class Experts(nn.Module):
    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape)))


def counted(module: nn.Module, attribute: str = "num_experts", count: int = 4) -> nn.Module:
    setattr(module, attribute, count)
    return module


@pytest.mark.parametrize(
    ("path", "module", "batches"),
    [
        ("mlp", counted(Experts(up=(4, 6, 5), bias=(4, 6))), {"up": 4, "bias": 4}),
        ("experts", Experts(w1=(4, 6, 5), w1_bias=(4, 6), scale=(4,)), {"w1": 4, "w1_bias": 4, "scale": 1}),
        ("shared", counted(Experts(up=(2, 6, 5)), "n_shared_experts", 2), {"up": 2}),
        ("router", counted(Experts(weight=(4, 5))), {"weight": 1}),
        ("other", Experts(weight=(4, 6, 5)), {"weight": 1}),
        ("other", counted(Experts(weight=(3, 6, 5))), {"weight": 1}),
        ("other", counted(Experts(weight=(4, 6, 5)), "num_experts_per_tok"), {"weight": 1}),
        ("experts", nn.ParameterList([torch.zeros(4, 6, 5)]), {"0": 1}),
        ("experts", nn.Conv1d(6, 4, 5), {"weight": 1, "bias": 1}),
    ],
)
def test_stacked_experts(path: str, module: nn.Module, batches: dict[str, int]) -> None:
    found = kinds(nn.ModuleDict({path: module}))
    assert {name: found[id(p)].batch for name, p in module.named_parameters()} == batches


def test_stacked_experts_under_a_parametrisation() -> None:
    module = Experts(w1=(4, 6, 5))
    parametrizations.spectral_norm(module, "w1")
    found = kinds(nn.ModuleDict({"experts": module}))
    assert [found[id(p)].batch for p in module.parameters()] == [4]


def test_experts_that_are_runs_of_rows() -> None:
    """As DBRX's are; the router's rows are experts too, but one each."""
    mlp = counted(Experts(w1=(24, 5), w2=(24, 5)), "moe_num_experts")
    model = nn.ModuleDict({"experts": nn.ModuleDict({"mlp": mlp}), "router": counted(Experts(weight=(4, 5)))})
    found = kinds(model)
    assert [found[id(p)].batch for p in model.parameters()] == [4, 4, 1]


def test_experts_by_name_alone() -> None:
    assert name_kind("layers.0.experts.w1", torch.zeros(4, 6, 5)).batch == 4
    assert name_kind("layers.0.experts.w1_bias", torch.zeros(4, 6)).batch == 4
    assert name_kind("layers.0.experts.0.weight", torch.zeros(4, 6)) == Kind()
    assert name_kind("layers.0.experts.0", torch.zeros(4, 6, 5)) == Kind()


def test_what_a_framework_did_to_a_parameter_is_read_by_its_reader() -> None:
    model = nn.ModuleDict({"hidden": nn.Linear(4, 4), "out": nn.Linear(4, 9), "experts": nn.Linear(4, 4)})
    model["experts"].weight = nn.Parameter(torch.zeros(3, 5, 4))  # type: ignore[index]
    shapes = {id(p): tuple(p.shape) for p in model.parameters()}
    expected, out = kinds(model), model["out"].weight  # type: ignore[index]
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    taken_away = Reader(shape_of=lambda parameter: shapes[id(parameter)])
    assert kinds(model, taken_away) == expected != kinds(model)
    assert name_kind("lm_head.weight", out, taken_away).role is Role.HEAD
    marked = Reader(taken_away.shape_of, lambda parameter: parameter is out)
    assert roles(model, marked)[id(out)] is Role.HEAD
    assert name_kind("out.weight", out, marked).role is Role.HEAD
    assert [role for role in roles(model, marked).values() if role is not Role.WEIGHT] == [Role.HEAD]
