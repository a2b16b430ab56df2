"""The dynamic meta-prompt of FM-LoRA (arXiv:2504.08823), Sec. 3.4."""

import flax.linen as nn
import jax
from jaxtyping import Array, Float, PRNGKeyArray


class MetaPrompt(nn.Module):
  """n_p tokens between class token and patches: [CLS; P; E(x)], Eq. (13). All tasks train them.

  Its collection is the group `shared`: prompt [P, D], normal with standard deviation 0.02.

  Attributes:
    num_tokens: n_p.
    width: D, of the ViT.
  """

  num_tokens: int
  width: int

  @nn.compact
  def __call__(self, key: PRNGKeyArray | None = None) -> Float[Array, "P D"]:
    """Returns the tokens; `init` alone needs the key."""
    return self.variable("shared", "prompt", self.new_tokens, key).value

  def new_tokens(self, key: PRNGKeyArray) -> Float[Array, "P D"]:
    return 0.02 * jax.random.normal(key, (self.num_tokens, self.width))
