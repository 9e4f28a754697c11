"""What depends on DeepSpeed's release, on NVMe or on models of certain kinds; the rest is tested with the engine."""

from __future__ import annotations

from types import SimpleNamespace

import deepspeed
import pytest
from deepspeed.ops.op_builder import AsyncIOBuilder
from torch import nn

from ds_shampoo import SettingsError
from ds_shampoo.frameworks.deepspeed.support import refuse_unsupported


@pytest.mark.parametrize("release", ["0.16.0", "0.18.9+abc"])
@pytest.mark.parametrize(
    ("engine", "named"),
    [
        (SimpleNamespace(zero_optimization_stage=lambda: 3), "zero_optimization.stage = 3: with DeepSpeed before 0.19"),
        (SimpleNamespace(pipeline_parallelism=True), "pipeline parallelism .* with DeepSpeed before 0.19"),
        (
            SimpleNamespace(zero_optimization_stage=lambda: 0, bfloat16_enabled=lambda: True),
            "bf16.enabled = true at zero_optimization.stage = 0: with DeepSpeed before 0.19",
        ),
    ],
    ids=["stage3", "pipeline", "bf16"],
)
def test_older_releases(monkeypatch: pytest.MonkeyPatch, release: str, engine: SimpleNamespace, named: str) -> None:
    monkeypatch.setattr(deepspeed, "__version__", release)
    with pytest.raises(SettingsError, match=named):
        refuse_unsupported(engine)


@pytest.mark.parametrize("release", ["0.19.0", "0.20.1", "1.0.0"])
def test_tested_releases(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    monkeypatch.setattr(deepspeed, "__version__", release)
    refuse_unsupported(SimpleNamespace(zero_optimization_stage=lambda: 3))
    refuse_unsupported(SimpleNamespace(zero_optimization_stage=lambda: 1, pipeline_parallelism=True))
    refuse_unsupported(SimpleNamespace(zero_optimization_stage=lambda: 0, bfloat16_enabled=lambda: True))


def with_nvme(section: str, stage: int, pipeline: bool = False) -> SimpleNamespace:
    offload = SimpleNamespace(device="nvme", pipeline_read=pipeline, pipeline_write=False)
    return SimpleNamespace(**{f"zero_{section}": lambda: offload}, zero_optimization_stage=lambda: stage)


@pytest.mark.parametrize(
    ("engine", "libaio", "named"),
    [
        (with_nvme("offload_optimizer", 2), True, r'offload_optimizer.device = "nvme": at stage 3 only'),
        (with_nvme("offload_optimizer", 3), False, r'offload_optimizer.device = "nvme": DeepSpeed needs libaio'),
        (with_nvme("offload_optimizer", 3, True), True, "pipeline_read or pipeline_write = true with NVMe"),
        (with_nvme("offload_param", 3), True, r'offload_param.device = "nvme"'),
    ],
    ids=["stage", "libaio", "pipelined", "parameters"],
)
def test_nvme(monkeypatch: pytest.MonkeyPatch, engine: SimpleNamespace, libaio: bool, named: str) -> None:
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_: libaio)
    with pytest.raises(SettingsError, match=named):
        refuse_unsupported(engine)


def test_experts_of_megatron() -> None:
    model = nn.Linear(2, 2)
    refuse_unsupported(SimpleNamespace(module=model))
    model.weight.allreduce = False  # type: ignore[attr-defined]
    with pytest.raises(SettingsError, match="expert model parallelism of Megatron: DeepSpeed does not know"):
        refuse_unsupported(SimpleNamespace(module=model))
    model.weight.group_name = "ep_size_2"  # type: ignore[attr-defined]
    refuse_unsupported(SimpleNamespace(module=model, zero_optimization_stage=lambda: 2))
    with pytest.raises(SettingsError, match=r"zero_optimization.stage = 3 with expert model parallelism of Megatron"):
        refuse_unsupported(SimpleNamespace(module=model, zero_optimization_stage=lambda: 3))


def test_auto_parallelism() -> None:
    with pytest.raises(SettingsError, match="tensor or model parallelism"):
        refuse_unsupported(SimpleNamespace(autotp_size=lambda: 2))
    config = SimpleNamespace(expert_parallel_config=SimpleNamespace(enabled=True))
    with pytest.raises(SettingsError, match=r"expert_parallel.enabled = true \(AutoEP\)"):
        refuse_unsupported(SimpleNamespace(_config=config))
