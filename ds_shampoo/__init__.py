"""Distributed Shampoo for DeepSpeed: `import ds_shampoo`, then `"optimizer": {"type": "Shampoo"}` in the JSON."""

from ds_shampoo.config import SettingsError, ShampooConfig
from ds_shampoo.frameworks.deepspeed import initialize, register
from ds_shampoo.frameworks.transformers import for_trainer
from ds_shampoo.optimizer import Shampoo
from ds_shampoo.step.transaction import BrokenStepError

__version__ = "0.1.0"
__all__ = ["BrokenStepError", "SettingsError", "Shampoo", "ShampooConfig", "for_trainer", "initialize", "register"]

register()
