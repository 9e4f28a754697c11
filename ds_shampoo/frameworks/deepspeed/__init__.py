"""Shampoo under DeepSpeed: how the JSON's "Shampoo" is built, and how ZeRO's layouts become fragments."""

from ds_shampoo.frameworks.deepspeed.entry import initialize, register

__all__ = ["initialize", "register"]
