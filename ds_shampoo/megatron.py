"""Shampoo for models of Megatron-core: under DeepSpeed by `mpu` or `GPTPipeline`, and in Megatron's own training.

`ds_shampoo.megatron.mpu` goes into `ds_shampoo.initialize(..., mpu=mpu)`.
"""

from typing import TYPE_CHECKING, Any

try:
    import megatron.core  # noqa: F401
except ImportError as error:
    raise ImportError("ds_shampoo.megatron needs megatron-core: pip install 'ds-shampoo[megatron]'") from error

from ds_shampoo.frameworks.megatron.optimizer import get_megatron_shampoo_optimizer
from ds_shampoo.frameworks.megatron.registry import register_emerging_optimizer
from ds_shampoo.frameworks.megatron_deepspeed import mpu
from ds_shampoo.frameworks.megatron_deepspeed.experts import register_experts

if TYPE_CHECKING:
    from ds_shampoo.frameworks.megatron_deepspeed.pipeline import GPTPipeline

__all__ = ["GPTPipeline", "get_megatron_shampoo_optimizer", "mpu", "register_emerging_optimizer", "register_experts"]


def __getattr__(name: str) -> Any:
    """Imports the pipeline, and DeepSpeed with it, only where it is asked for."""
    if name == "GPTPipeline":
        from ds_shampoo.frameworks.megatron_deepspeed.pipeline import GPTPipeline

        return GPTPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
