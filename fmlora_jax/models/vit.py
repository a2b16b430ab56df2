"""One Vision Transformer for everything: plain, or changed by `Adapters`.

Source: ViT (arXiv:2010.11929) with pre-norm blocks; LayerScale and interpolated positions as in
DINOv2 (arXiv:2304.07193). Equal to timm's and Hugging Face's forward pass (tests/models).
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from fmlora_jax.models import bottleneck, low_rank, products
from fmlora_jax.types import (
  Adapters,
  Backbone,
  Deltas,
  LayerAdapters,
  LowRank,
  Params,
  Prefix,
  Sizes,
)

PROJECTIONS = ("query", "key", "value", "out", "fc1", "fc2")

ARCHITECTURES: Mapping[str, Sizes] = {
  "micro": Sizes(image_size=32, patch_size=8, width=96, depth=6, num_heads=3),
  "vit_ti16": Sizes(width=192, num_heads=3),
  "vit_s16": Sizes(width=384, num_heads=6),
  "vit_b16": Sizes(),
  "vit_l16": Sizes(width=1024, depth=24, num_heads=16),
  "dinov2_s14": Sizes(patch_size=14, width=384, num_heads=6, layer_scale=True),
  "dinov2_b14": Sizes(patch_size=14, layer_scale=True),
}


class LayerNorm(nn.Module):
  """(x - mean) / standard deviation · scale + bias, in float32. Source: arXiv:1607.06450.

  nn.LayerNorm's numbers and parameters in fewer passes over the tokens; the two-pass variance is
  the one timm computes.
  """

  dtype: DTypeLike
  epsilon: float

  @nn.compact
  def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
    bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    rate = jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + self.epsilon)
    return (centred * (rate * scale) + bias).astype(self.dtype)


def dense(features: int, dtype: DTypeLike, name: str) -> nn.Dense:
  """Returns nn.Dense with `products.multiply` as its product over the input's last axis."""

  def product(x, kernel, dimensions, precision):
    del dimensions, precision
    return products.multiply(x, kernel)

  return nn.Dense(features, dtype=dtype, dot_general=product, name=name)


class AdaptedDense(nn.Module):
  """A dense layer that low-rank deltas may shift; without one it is plain."""

  features: int
  dtype: DTypeLike

  @nn.compact
  def __call__(
    self, x: Float[Array, "B N D"], delta: LowRank | tuple[LowRank, ...] = ()
  ) -> Float[Array, "B N E"]:
    y = dense(self.features, self.dtype, "dense")(x)
    for part in delta if isinstance(delta, tuple) else (delta,):
      y = y + low_rank.apply(x, part)
    return y


def attention(
  query: Float[Array, "B N H d"], key: Float[Array, "B M H d"], value: Float[Array, "B M H d"]
) -> Float[Array, "B N H d"]:
  """Returns softmax(q·kᵀ/√d)·v with the softmax in float32. Source: arXiv:1706.03762 Eq. (1)."""
  if jax.default_backend() != "cpu":
    return jax.nn.dot_product_attention(query, key, value)
  # a CPU multiplies matrices that lie whole in memory faster, and it is cheaper to normalise the
  # small output than the large weights: a fifth less time
  query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query * query.shape[-1] ** -0.5, key, value))
  scores = jnp.einsum("bhnd,bhmd->bhnm", query, key, preferred_element_type=jnp.float32)
  weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
  mixed = (weights.astype(value.dtype) @ value) / weights.sum(-1, keepdims=True)
  return jnp.swapaxes(mixed.astype(value.dtype), 1, 2)


@functools.partial(jax.checkpoint, static_argnums=1)
def gelu(x: Float[Array, "*B F"], kind: str) -> Float[Array, "*B F"]:
  """Returns x·Φ(x), Φ "erf" or its approximation "tanh", computed in float32.

  The backward pass saves x alone and computes the rest again: memory, not arithmetic, takes the
  time here. Source: arXiv:1606.08415.
  """
  x32 = x.astype(jnp.float32)
  if kind == "tanh":
    y = jax.nn.gelu(x32, approximate=True)
  else:  # jax.nn.gelu's erfc takes a CPU three times as long
    y = 0.5 * x32 * (1 + jax.lax.erf(x32 * 0.5**0.5))
  return y.astype(x.dtype)


class Attention(nn.Module):
  """Multi-head self-attention; a prefix adds keys and values that have no query.

  With `num_queries` only that many leading tokens have a query and come back. Tokens in several
  parts are projected part by part: one without a gradient then adds no backward cost.
  """

  num_heads: int
  dtype: DTypeLike

  @nn.compact
  def __call__(
    self,
    parts: Sequence[Float[Array, "B _ D"]],
    deltas: Deltas,
    prefix: Prefix | None,
    num_queries: int | None = None,
  ) -> Float[Array, "B Q D"]:
    width = parts[0].shape[-1]

    def project(name, parts):
      layer = AdaptedDense(width, self.dtype, name=name)
      y = jnp.concatenate([layer(part, deltas.get(name, ())) for part in parts], axis=1)
      return rearrange(y, "b n (h d) -> b n h d", h=self.num_heads)

    queried = parts if len(parts) > 1 else (parts[0][:, :num_queries],)
    query = project("query", queried)[:, :num_queries]
    key, value = project("key", parts), project("value", parts)
    if prefix is not None:
      key, value = _prepend(prefix.key, key), _prepend(prefix.value, value)
    mixed = rearrange(attention(query, key, value), "b n h d -> b n (h d)")
    return AdaptedDense(width, self.dtype, name="out")(mixed, deltas.get("out", ()))


def _prepend(front: Float[Array, "*B P D"], tokens: Float[Array, "B N *D"]) -> Array:
  """Puts `front` before the tokens of each sample; one without a batch axis, or of 1, for all."""
  front = jnp.broadcast_to(front, (tokens.shape[0], *front.shape[-tokens.ndim + 1 :]))
  return jnp.concatenate([front.astype(tokens.dtype), tokens], axis=1)


class Block(nn.Module):
  """x + attention(LN(x)), then x + mlp(LN(x)); each branch with LayerScale where sizes say so.

  x may come in parts, which are joined here. With `num_queries` only that many leading tokens come
  back. Returns the tokens, and the inputs of query, key and value, in parts.
  """

  sizes: Sizes
  dtype: DTypeLike

  @nn.compact
  def __call__(
    self,
    parts: Sequence[Float[Array, "B _ D"]],
    adapters: LayerAdapters,
    num_queries: int | None = None,
  ) -> tuple[Float[Array, "B Q D"], list[Float[Array, "B _ D"]]]:
    sizes, deltas = self.sizes, adapters.deltas

    def scaled(branch, name):
      if not sizes.layer_scale:
        return branch
      gamma = self.param(name, nn.initializers.ones, (sizes.width,))
      return branch * gamma.astype(self.dtype)

    def bottlenecked(branch, site, source):
      layer = adapters.bottlenecks.get(site)
      return branch if layer is None else branch + bottleneck.apply(source, layer)

    norm1 = LayerNorm(self.dtype, sizes.epsilon, name="norm1")
    attend = Attention(sizes.num_heads, self.dtype, name="attention")
    normed = [norm1(part) for part in parts]
    y = scaled(attend(normed, deltas, adapters.prefix, num_queries), "scale1")
    x = jnp.concatenate(parts, axis=1)[:, :num_queries] + bottlenecked(y, "attention", y)
    y = LayerNorm(self.dtype, sizes.epsilon, name="norm2")(x)
    hidden = sizes.width * sizes.mlp_ratio
    y = AdaptedDense(hidden, self.dtype, name="fc1")(y, deltas.get("fc1", ()))
    y = gelu(y, sizes.gelu)
    y = AdaptedDense(sizes.width, self.dtype, name="fc2")(y, deltas.get("fc2", ()))
    y = scaled(y, "scale2")
    return x + bottlenecked(bottlenecked(y, "mlp", y), "parallel", x), normed


class ViT(nn.Module):
  """Images -> tokens after the final LayerNorm, and the attention inputs of each block.

  The class token is at index 0. With `num_queries` only that many leading tokens come back: the
  last block then computes nothing but keys and values for the others, which saves 10/12 of a block
  forward and backward. The attention inputs are what query, key and value project: all tokens of
  each block after its first LayerNorm.
  """

  sizes: Sizes
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    images: Float[Array, "B S S 3"],
    adapters: Adapters | None = None,
    num_queries: int | None = None,
  ) -> tuple[Float[Array, "B Q D"], list[Float[Array, "B N D"]]]:
    sizes, adapters = self.sizes, adapters or Adapters()
    p = sizes.patch_size
    # a convolution whose stride is its size is one matrix product over patches
    patches = rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=p, q=p)
    x = dense(sizes.width, self.dtype, "embedding")(patches)
    cls = self.param("cls", nn.initializers.zeros, (1, sizes.width))
    position = self.param("position", nn.initializers.normal(0.02), (sizes.num_tokens, sizes.width))
    x = _prepend(cls, x) + position.astype(x.dtype)
    parts = (x,)
    if adapters.prompt is not None:  # often all that the first block passes a gradient to
      prompt = jnp.broadcast_to(adapters.prompt, (len(x), *adapters.prompt.shape[-2:]))
      parts = x[:, :1], prompt.astype(x.dtype), x[:, 1:]
    inputs = []
    for layer in range(sizes.depth):
      wanted = num_queries if layer == sizes.depth - 1 else None
      block = Block(sizes, self.dtype, name=f"block_{layer}")
      x, normed = block(parts, adapters.at_layer(layer), wanted)
      inputs.append(jnp.concatenate(normed, axis=1))
      parts = (x,)
    return LayerNorm(self.dtype, sizes.epsilon, name="norm")(x), inputs


def make_vit(sizes: Sizes, dtype: DTypeLike = jnp.float32) -> Backbone:
  """Returns the ViT of the given sizes as pure functions; compute in `dtype`, features float32."""
  module = ViT(sizes, dtype)

  def forward(params, images, adapters, num_queries) -> Any:
    return module.apply({"params": params}, images, adapters, num_queries)

  def tokens(params, images, adapters=None, num_queries=None):
    return forward(params, images, adapters, num_queries)[0]

  def apply(params, images, adapters=None):
    return tokens(params, images, adapters, num_queries=1)[:, 0].astype(jnp.float32)

  def attention_inputs(params, images, adapters=None):
    _, inputs = forward(params, images, adapters, 1)
    return jnp.stack(inputs)

  def init(key: PRNGKeyArray) -> Params:
    image = jnp.zeros((1, sizes.image_size, sizes.image_size, 3), dtype)
    return dict(module.init(key, image)["params"])

  return Backbone(
    apply=apply, tokens=tokens, attention_inputs=attention_inputs, init=init, sizes=sizes
  )


def architecture(name: str, **changes) -> Sizes:
  """Returns the sizes of a named architecture with fields changed (image_size, depth, gelu).

  Raises:
    ValueError: if the name is unknown.
  """
  if name not in ARCHITECTURES:
    raise ValueError(f"architecture is {name!r}: must be one of {sorted(ARCHITECTURES)}")
  return dataclasses.replace(ARCHITECTURES[name], **changes)
