"""Learned prompts as what attention sees: prefixes of keys and values for some of the layers."""

from collections.abc import Sequence

from einops import rearrange
from jaxtyping import Array, Float

from fmlora_jax.types import Prefix


def prefixes(
  prompts: Float[Array, "B S 2 P D"], layers: Sequence[int], num_heads: int
) -> tuple[Prefix | None, ...]:
  """Returns the prefix of each layer, with None for those that have none.

  Args:
    prompts: keys (index 0 of axis 2) and values (index 1) for S layers; one for all samples (B = 1)
      or one for each.
    layers: ascending, S of them.

  Source: prefix tuning as in DualPrompt (arXiv:2204.04799) Eq. (5); axes stay apart, where some
  public codes reshape samples into keys.
  """
  split = rearrange(prompts, "b s two p (h d) -> s two b p h d", h=num_heads)
  found: list[Prefix | None] = [None] * (max(layers) + 1)
  for layer, (key, value) in zip(layers, split, strict=True):
    found[layer] = Prefix(key=key, value=value)
  return tuple(found)
