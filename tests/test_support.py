"""What depends on DeepSpeed's release, on NVMe or on models of certain kinds; the rest is tested with the engine."""

from __future__ import annotations

from types import SimpleNamespace

import deepspeed
import pytest

from ds_shampoo import SettingsError
from ds_shampoo.deepspeed.support import refuse_unsupported


@pytest.mark.parametrize("release", ["0.16.0", "0.18.9+abc"])
@pytest.mark.parametrize(
    ("engine", "named"),
    [
        (SimpleNamespace(zero_optimization_stage=lambda: 3), "zero_optimization.stage = 3: with DeepSpeed before 0.19"),
        (SimpleNamespace(pipeline_parallelism=True), "pipeline parallelism .* with DeepSpeed before 0.19"),
    ],
    ids=["stage3", "pipeline"],
)
def test_older_releases(monkeypatch: pytest.MonkeyPatch, release: str, engine: SimpleNamespace, named: str) -> None:
    monkeypatch.setattr(deepspeed, "__version__", release)
    with pytest.raises(SettingsError, match=named):
        refuse_unsupported(engine)


@pytest.mark.parametrize("release", ["0.19.0", "0.20.1", "1.0.0"])
def test_tested_releases(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    monkeypatch.setattr(deepspeed, "__version__", release)
    refuse_unsupported(SimpleNamespace(zero_optimization_stage=lambda: 3, pipeline_parallelism=True))


@pytest.mark.parametrize("section", ["offload_optimizer", "offload_param"])
def test_nvme(section: str) -> None:
    engine = SimpleNamespace(**{f"zero_{section}": lambda: SimpleNamespace(device="nvme")})
    with pytest.raises(SettingsError, match=rf'zero_optimization.{section}.device = "nvme"'):
        refuse_unsupported(engine)


def test_auto_parallelism() -> None:
    with pytest.raises(SettingsError, match="tensor or model parallelism"):
        refuse_unsupported(SimpleNamespace(autotp_size=lambda: 2))
    config = SimpleNamespace(expert_parallel_config=SimpleNamespace(enabled=True))
    with pytest.raises(SettingsError, match=r"expert_parallel.enabled = true \(AutoEP\)"):
        refuse_unsupported(SimpleNamespace(_config=config))
