"""Random resized crops, flips, centre crops and normalisation on the device.

torchvision's geometry with Pillow's antialiased resampling, as two small matrices per image that
are built from traced boxes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from fmlora_jax.config import ConfigError
from fmlora_jax.types import Batch, Examples

TRIES = 10  # torchvision's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
  """Settings of an augmentation.

  Attributes:
    scale: range of the crop's share of the image's area; None: training images as at test time.
    ratio: range of the crop's width over height.
    flip: mirror half of the training images.
    eval_resize: the shorter side before the centre crop, over the side after it.
    eval_filter: of that resize; random crops are bilinear.
  """

  scale: tuple[float, float] | None
  ratio: tuple[float, float] = (3 / 4, 4 / 3)
  flip: bool = False
  eval_resize: float = 1.0
  eval_filter: str = "bicubic"


PRESETS = {
  "pilot": Augmentation(scale=(0.05, 1.0), flip=True, eval_resize=256 / 224),
  "coda": Augmentation(scale=(0.08, 1.0), flip=True, eval_resize=256 / 224, eval_filter="bilinear"),
  "coda_uncropped": Augmentation(scale=(0.08, 1.0), flip=True, eval_filter="bilinear"),  # squares
  "mild": Augmentation(scale=(0.7, 1.0), ratio=(0.9, 1.1)),
  "none": Augmentation(scale=None),
}

NORMALISATIONS = {  # (mean, standard deviation) of pixels in [0, 1]
  "zero_one": (0.0, 1.0),
  "half": (0.5, 0.5),
  "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def check(augmentation: str, normalisation: str | None) -> None:
  """Raises a ConfigError if either name is unknown."""
  for field, name, known in (
    ("augmentation", augmentation, PRESETS),
    ("normalisation", normalisation, NORMALISATIONS),
  ):
    if name not in known:
      raise ConfigError(f"config.input.{field} is {name!r}: must be one of {', '.join(known)}")


def gather_rows(examples: Examples, rows: Int[Array, " B"]) -> Examples:
  """Returns the examples of `rows`; -1 is padding, any example that is not valid."""
  gathered = jax.tree.map(lambda leaf: leaf[jnp.maximum(rows, 0)], examples)
  return gathered.replace(valid=gathered.valid & (rows >= 0))


Gather = Callable[[Examples, Int[Array, " B"]], Examples]


def train_batch(
  examples: Examples,
  rows: Int[Array, " B"],
  key: PRNGKeyArray,
  *,
  size: int,
  augmentation: str,
  normalisation: str,
  dtype: Any = jnp.float32,
  gather: Gather = gather_rows,
) -> Batch:
  """Returns the images of `rows`, each with a random crop and flip.

  Args:
    examples: where the rows are from.
    rows: -1 is padding: such a row is not valid, its label 0, its image any.
    key: a row's randomness depends on the key and on its position in `rows` alone.
    size: side in pixels of what comes back. Static, as is all below.
    augmentation: a name in `PRESETS`.
    normalisation: a name in `NORMALISATIONS`.
    dtype: of the images; computed in float32.
    gather: what `gather_rows` above does, where the examples lie.

  Raises:
    ConfigError: if either name is unknown.
  """
  check(augmentation, normalisation)
  preset = PRESETS[augmentation]
  if preset.scale is None:
    settings = {"size": size, "augmentation": augmentation, "normalisation": normalisation}
    return test_batch(examples, rows, dtype=dtype, gather=gather_rows, **settings)
  keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(rows)))

  def view(extent, key):
    (top, left, height, width), flip = random_box(key, extent, preset)
    down = weights(canvas[0], size, View(top, height, 0, height / size), triangle)
    across = weights(canvas[1], size, View(left, width, 0, width / size), triangle)
    return down, jnp.where(flip, across[::-1], across)

  canvas = examples.images.shape[1:3]
  gathered = gather_rows(examples, rows)
  return _batch(gathered, lambda extents: jax.vmap(view)(extents, keys), normalisation, dtype)


def test_batch(
  examples: Examples,
  rows: Int[Array, " B"],
  *,
  size: int,
  augmentation: str,
  normalisation: str,
  dtype: Any = jnp.float32,
  gather: Gather = gather_rows,
) -> Batch:
  """Returns the images of `rows`, resized and cropped at the centre; arguments as above."""
  check(augmentation, normalisation)
  preset = PRESETS[augmentation]
  kernel = KERNELS[preset.eval_filter]
  resized = round(size * preset.eval_resize)
  canvas = examples.images.shape[1:3]

  def view(extent):
    side = resized * extent // jnp.min(extent)  # the shorter is `resized`, the longer truncated
    offset = jnp.round((side - size) / 2)  # half to even, as Python's
    return tuple(
      weights(
        canvas[axis], size, View(0, extent[axis], offset[axis], extent[axis] / side[axis]), kernel
      )
      for axis in (0, 1)
    )

  return _batch(gather(examples, rows), jax.vmap(view), normalisation, dtype)


def random_box(
  key: PRNGKeyArray, extent: Int[Array, " 2"], preset: Augmentation
) -> tuple[tuple[Int[Array, ""], ...], Bool[Array, ""]]:
  """Returns (top, left, height, width) in pixels of a random crop, and whether to mirror it.

  Source: torchvision's RandomResizedCrop: the first of ten draws that fits, else the largest
  centred box within the ratios. All ten are drawn at once.
  """
  height, width = extent[0], extent[1]
  draws = jax.random.uniform(key, (2 * TRIES + 3,))
  area = height * width * _between(draws[:TRIES], *(preset.scale or (1.0, 1.0)))
  lo, hi = preset.ratio
  ratio = jnp.exp(_between(draws[TRIES : 2 * TRIES], math.log(lo), math.log(hi)))
  widths, heights = _rint(jnp.sqrt(area * ratio)), _rint(jnp.sqrt(area / ratio))
  fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
  first = jnp.argmax(fits)

  whole = width / height
  w = jnp.where(whole > hi, jnp.maximum(_rint(height * hi), 1), width)
  h = jnp.where(whole < lo, jnp.maximum(_rint(width / lo), 1), height)
  w, h = jnp.where(fits.any(), widths[first], w), jnp.where(fits.any(), heights[first], h)

  free = jnp.stack([height - h, width - w])
  anywhere = jnp.minimum((draws[-3:-1] * (free + 1)).astype(jnp.int32), free)
  top, left = jnp.where(fits.any(), anywhere, free // 2)
  return (top, left, h, w), preset.flip & (draws[-1] < 0.5)


def _between(uniform, lo, hi):
  return lo + uniform * (hi - lo)


def _rint(x):
  return jnp.round(x).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class View:
  """One axis of a resampling: output pixel i covers input lo + (i + start) * scale onwards.

  Only the input pixels lo..lo+length-1 are seen.
  """

  lo: Any
  length: Any
  start: Any
  scale: Any


def weights(
  count: int, size: int, view: View, kernel: Callable[[Array], Array]
) -> Float[Array, "size count"]:
  """Returns the matrix that resamples `count` pixels to `size`.

  Source: Pillow's precompute_coeffs: the kernel is stretched by the reduction (antialias), cut off
  at the box and normalised.
  """
  center = view.lo + (jnp.arange(size)[:, None] + view.start + 0.5) * view.scale
  pixel = jnp.arange(count)[None, :]
  distance = jnp.abs(pixel + 0.5 - center) / jnp.maximum(view.scale, 1.0)
  inside = (pixel >= view.lo) & (pixel < view.lo + view.length)
  values = jnp.where(inside, kernel(distance), 0.0)
  return values / values.sum(axis=1, keepdims=True)


def triangle(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
  return jnp.maximum(1.0 - x, 0.0)


def cubic(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
  """Returns Keys' kernel with a = -0.5, Pillow's, at x >= 0."""
  near = (1.5 * x - 2.5) * x * x + 1.0
  far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
  return jnp.where(x < 1.0, near, jnp.where(x < 2.0, far, 0.0))


KERNELS = {"bilinear": triangle, "bicubic": cubic}


def _batch(gathered: Examples, views, normalisation: str, dtype) -> Batch:
  """Returns the batch under the matrices (down, across) that `views` makes of sizes."""
  down, across = views(gathered.sizes)
  # highest: on GPU and TPU the default would round pixels to ten or seven bits of mantissa.
  # Columns first and clipped between, as Pillow before 12.3 does: bicubic overshoots at edges.
  resample = functools.partial(jnp.einsum, precision="highest")
  pixels = resample("bxw,bhwc->bhxc", across, gathered.images.astype(jnp.float32))
  pixels = resample("byh,bhxc->byxc", down, jnp.clip(pixels, 0.0, 255.0))
  mean, std = (
    jnp.asarray(m, jnp.float32).reshape(1, 1, 1, -1) for m in NORMALISATIONS[normalisation]
  )
  images = (jnp.clip(pixels, 0.0, 255.0) / 255.0 - mean) / std
  return Batch(
    images=images.astype(dtype),
    labels=jnp.where(gathered.valid, gathered.labels, 0),
    valid=jnp.asarray(gathered.valid),
  )
