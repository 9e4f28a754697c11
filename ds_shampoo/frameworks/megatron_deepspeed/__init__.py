"""Megatron-core models under DeepSpeed: an `mpu`, a pipeline, experts, and what becomes of their gradients."""
