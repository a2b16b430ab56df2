"""The ViT, its weights and the algebra that adapts it; the only place that imports flax.linen."""
