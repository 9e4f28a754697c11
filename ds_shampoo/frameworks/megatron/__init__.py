"""Shampoo in Megatron-core's own training: its optimizers' wrappers around our inner one."""
