"""The modern GPT: what it computes, by an independent reference, and what the optimizer sees of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ds_shampoo.algorithm.selection import Role, roles
from gpt.build import build_gpt
from gpt.model import GPT, MLPS, GPTConfig
from gpt.modern import ModernGPT, rotary_table, rotate

SMALL = GPTConfig(layers=2, d_model=32, heads=4, context=16, architecture="modern")
SQUARED = GPTConfig(layers=2, d_model=32, heads=4, context=16, architecture="modern", mlp="squared_relu")


def spread(config: GPTConfig) -> ModernGPT:
    """A model in fp64 whose weights, those of norms too, are large enough that all parts matter."""
    torch.manual_seed(0)
    model = ModernGPT(config).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turned(x: Tensor, position: int) -> Tensor:
    """One head's features, each pair turned by its own rotation matrix."""
    out = torch.empty_like(x)
    for at in range(0, len(x), 2):
        angle = position / 10_000 ** (at / len(x))
        matrix = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        out[at : at + 2] = matrix.to(x) @ x[at : at + 2]
    return out


def reference(model: ModernGPT, tokens: Tensor) -> Tensor:
    """Logits of one text, int64 [context], head by head and position by position."""
    weights, config = dict(model.named_parameters()), model.config
    width = config.d_model // config.heads
    x = weights["token_embedding.weight"][tokens]
    for layer in range(config.layers):
        own = {name.split(".", 2)[2]: p for name, p in weights.items() if name.startswith(f"layers.{layer}.")}
        normed = rms(x, own["attention_norm.weight"])
        query, key, value = (normed @ own[f"attention.{name}.weight"].T for name in ("query", "key", "value"))
        mixed = torch.zeros_like(x)
        for head in (slice(at, at + width) for at in range(0, config.d_model, width)):
            queries, keys = (
                [turned(rms(row, own[f"attention.{name}_norm.weight"]), at) for at, row in enumerate(rows[:, head])]
                for name, rows in (("query", query), ("key", key))
            )
            for at, looking in enumerate(queries):
                scores = torch.stack([looking @ keys[before] for before in range(at + 1)]) / math.sqrt(width)
                mixed[at, head] = scores.softmax(0) @ value[: at + 1, head]
        x = x + mixed @ own["attention.out.weight"].T
        normed = rms(x, own["mlp_norm.weight"])
        inner = normed @ own["mlp.up.weight"].T
        if config.mlp == "gated":
            gate = normed @ own["mlp.gate.weight"].T
            inner = gate * gate.sigmoid() * inner
        else:
            inner = inner.clamp(min=0) ** 2
        x = x + inner @ own["mlp.down.weight"].T
    return rms(x, weights["norm.weight"]) @ weights["lm_head.weight"].T


@pytest.mark.parametrize("config", [SMALL, SQUARED], ids=lambda config: config.mlp)
def test_the_loss_is_the_reference_s(config: GPTConfig) -> None:
    model = spread(config)
    tokens, targets = torch.randint(256, (2, 1, config.context))
    expected = F.cross_entropy(reference(model, tokens[0]), targets[0])
    # Rotations and the loss are fp32.
    assert model(tokens, targets).item() == pytest.approx(expected.item(), rel=1e-5)


def test_every_weight_matters() -> None:
    for config in (SMALL, SQUARED):
        model = spread(config)
        model(*torch.randint(256, (2, 2, config.context))).backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_a_product_of_rotated_heads_depends_on_the_distance_alone() -> None:
    torch.manual_seed(0)
    table = rotary_table(64, 8)
    one, other = torch.randn(2, 8).expand(64, 1, 2, 8).unbind(2)
    ones, others = (rotate(x.unsqueeze(0), table)[0, :, 0] for x in (one, other))
    products = ones @ others.T
    for distance in range(-8, 8):
        same = products.diagonal(distance)
        assert torch.allclose(same, same[:1].expand_as(same), atol=1e-4)
    assert products[0].std() > 0.1


@pytest.mark.parametrize("config", [SMALL, SQUARED], ids=lambda config: config.mlp)
def test_the_first_loss_is_that_of_a_guess(config: GPTConfig) -> None:
    torch.manual_seed(0)
    tokens, targets = torch.randint(256, (2, 8, config.context))
    assert build_gpt(config)(tokens, targets).item() == pytest.approx(math.log(256), abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mlp", MLPS)
@pytest.mark.filterwarnings("error")
def test_autocast_and_low_precision_weights_give_nearly_the_same_loss(mlp: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = build_gpt(GPTConfig(layers=2, d_model=32, heads=4, context=16, architecture="modern", mlp=mlp))
    tokens, targets = torch.randint(256, (2, 8, 16))
    exact = model(tokens, targets).item()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.float32):
        loss = model.to(dtype)(tokens, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize(
    ("d_model", "mlp", "layer"),
    [
        (256, "gated", 4 * 256**2 + 3 * 256 * 768),
        (768, "gated", 12 * 768**2),
        (256, "squared_relu", 12 * 256**2),
    ],
)
def test_the_feed_forward_half_is_as_wide_as_documented(d_model: int, mlp: str, layer: int) -> None:
    config = GPTConfig(layers=3, d_model=d_model, heads=4, architecture="modern", mlp=mlp)
    norms = 7 * d_model + 3 * 2 * d_model // 4
    parameters = sum(parameter.numel() for parameter in build_gpt(config).parameters())
    assert parameters == 3 * layer + 2 * 256 * d_model + norms


def test_the_default_size_is_what_the_readme_says() -> None:
    parameters = sum(parameter.numel() for parameter in build_gpt(GPTConfig(architecture="modern")).parameters())
    assert parameters == 3_541_760


def test_matrices_that_write_to_the_residual_stream_start_smaller() -> None:
    torch.manual_seed(0)
    model = build_gpt(GPTConfig(layers=8, d_model=64, heads=4, architecture="modern"))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            small = name.endswith(("out.weight", "down.weight"))
            assert parameter.std().item() == pytest.approx(0.02 / 4 if small else 0.02, rel=0.05), name
        else:
            assert torch.equal(parameter, torch.ones_like(parameter)), name


@pytest.mark.parametrize("config", [SMALL, SQUARED], ids=lambda config: config.mlp)
def test_the_optimizer_sees_what_every_parameter_is(config: GPTConfig) -> None:
    model = build_gpt(config)
    found = roles(model)
    for name, parameter in model.named_parameters():
        expected = {"token_embedding.weight": Role.EMBEDDING, "lm_head.weight": Role.HEAD}.get(name, Role.WEIGHT)
        assert found[id(parameter)] is expected, name
        assert (parameter.dim() == 1) == ("norm" in name), name


def test_checkpoints_have_no_rotations() -> None:
    assert not [name for name in build_gpt(SMALL).state_dict() if "rotary" in name]


def test_the_old_architecture_is_still_made() -> None:
    assert isinstance(build_gpt(GPTConfig()), GPT)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "llama"}, "architecture = 'llama': must be one of gpt2, modern"),
        ({"mlp": "gelu"}, "mlp = 'gelu': must be one of gated, squared_relu"),
        ({"architecture": "modern", "d_model": 12, "heads": 4}, "must be even, not 3"),
    ],
)
def test_an_impossible_kind_is_refused(settings: dict[str, str | int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig(**settings)  # type: ignore[arg-type]
