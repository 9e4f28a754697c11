"""Shampoo for models of Megatron-core: an mpu for DeepSpeed, and what tensor parallelism does to parameters."""

try:
    import megatron.core  # noqa: F401
except ImportError as error:
    raise ImportError("ds_shampoo.megatron needs megatron-core: pip install 'ds-shampoo[megatron]'") from error

from ds_shampoo.megatron import mpu
from ds_shampoo.megatron.experts import register_experts
from ds_shampoo.megatron.optimizer import get_megatron_shampoo_optimizer
from ds_shampoo.megatron.registry import register_emerging_optimizer

__all__ = ["get_megatron_shampoo_optimizer", "mpu", "register_emerging_optimizer", "register_experts"]
