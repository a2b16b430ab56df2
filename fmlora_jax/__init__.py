"""Continual learning on one frozen ViT: FM-LoRA and its rivals, in JAX."""
