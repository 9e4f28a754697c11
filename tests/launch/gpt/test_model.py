"""The GPT that the launch programs train: its size, its causality, its start."""

from __future__ import annotations

import math

import pytest
import torch

from gpt.model import GPT, GPTConfig

SMALL = GPTConfig(layers=2, d_model=32, heads=4, context=16)


def test_the_default_has_three_million_parameters() -> None:
    layers, tables, norms = 4 * 12 * 256**2, 3 * 256**2, 9 * 2 * 256
    parameters = sum(parameter.numel() for parameter in GPT(GPTConfig()).parameters())
    assert parameters == layers + tables + norms == 3_346_944


def test_the_first_loss_is_that_of_a_guess() -> None:
    torch.manual_seed(0)
    tokens, targets = torch.randint(256, (2, 8, SMALL.context))
    assert GPT(SMALL)(tokens, targets).item() == pytest.approx(math.log(256), abs=0.05)


def test_a_loss_does_not_see_later_tokens() -> None:
    torch.manual_seed(0)
    model = GPT(SMALL)
    tokens, targets = torch.randint(256, (2, 1, SMALL.context))
    changed = tokens.clone()
    changed[0, 8:] += 1
    # Targets of -100 don't count in the loss.
    early = targets.clone()
    early[0, 8:] = -100
    assert model(tokens, early).item() == pytest.approx(model(changed % 256, early).item(), abs=1e-6)
    assert model(tokens, targets).item() != pytest.approx(model(changed % 256, targets).item(), abs=1e-6)


def test_the_loss_is_fp32_whatever_the_weights_are() -> None:
    tokens, targets = torch.randint(256, (2, 1, SMALL.context))
    assert GPT(SMALL).bfloat16()(tokens, targets).dtype == torch.float32


@pytest.mark.parametrize(("sizes", "message"), [({"heads": 3}, "divisible by heads"), ({"layers": 0}, "layers = 0")])
def test_impossible_sizes_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig(**sizes)
