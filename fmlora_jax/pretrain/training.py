"""Supervised training of a small ViT on rendered letters."""

import dataclasses
import functools
import importlib.metadata
import json
import logging
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from fmlora_jax import config as config_lib
from fmlora_jax.models import vit
from fmlora_jax.models.weights import files
from fmlora_jax.pretrain import letters
from fmlora_jax.types import Backbone, Params

REPORT_EVERY = 500  # steps
VERSIONS_OF = ("jax", "flax", "optax", "numpy", "pillow", "matplotlib")

_log = logging.getLogger("fmlora_jax.pretrain")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
  """Settings of the pre-training: AdamW with warm-up and cosine annealing.

  Attributes:
    architecture: a name in models/vit.py with images as large as the letters.
    pool: number of training images, rendered once and drawn with replacement, each time with fresh
      contrast, noise and polarity.
    num_val: number of validation images, in `val_faces` only.
    val_faces: faces of letters.FACES without training images.
    coarse: share of images with no more detail than 8 x 8 pixels.
    quarter_turns: share of images turned by 90, 180 or 270 degrees.
    inverted: share of images shown as dark strokes on white.
    weight_decay: on kernels only.
  """

  architecture: str
  seed: int
  pool: int
  num_val: int
  val_faces: tuple[str, ...]
  coarse: float
  quarter_turns: float
  inverted: float
  steps: int
  batch_size: int
  learning_rate: float
  warmup_steps: int
  weight_decay: float
  label_smoothing: float

  def __post_init__(self):
    require = config_lib.require
    for name in ("pool", "num_val", "steps", "batch_size"):
      require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
    for name in ("coarse", "quarter_turns", "inverted", "label_smoothing"):
      require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")
    require(0 <= self.warmup_steps < self.steps, "warmup_steps", self.warmup_steps, "in [0, steps)")
    require(self.seed >= 0, "seed", self.seed, "at least 0")
    require(self.learning_rate > 0, "learning_rate", self.learning_rate, "positive")
    require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0")
    some = set() < set(self.val_faces) < set(letters.FACES)
    require(some, "val_faces", self.val_faces, f"some, not all, of {letters.FACES}")
    side = vit.architecture(self.architecture).image_size
    require(side == letters.SIDE, "architecture", self.architecture, f"for {letters.SIDE} pixels")


def train(recipe: Recipe, backbone: Backbone) -> tuple[Params, float]:
  """Returns the backbone's parameters and the accuracy on letters in held-out faces."""
  images, labels = render(recipe, "train")
  optimizer = make_optimizer(recipe)
  root = jax.random.key(recipe.seed)
  params, opt_state = init(backbone, optimizer, root)
  step = make_step(backbone, optimizer, recipe)
  rng = np.random.default_rng(recipe.seed)
  began = time.monotonic()
  for i in range(recipe.steps):
    rows = rng.integers(recipe.pool, size=recipe.batch_size)
    key = jax.random.fold_in(root, i)
    params, opt_state, loss = step(params, opt_state, images[rows], labels[rows], key)
    if (i + 1) % REPORT_EVERY == 0:
      if not np.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss} at step {i + 1}: lower config.learning_rate")
      _log.info("step %d loss %.4f, %.0f s", i + 1, loss, time.monotonic() - began)
  return params["backbone"], evaluate(backbone, params, *render(recipe, "val"))


def render(
  recipe: Recipe, split: str
) -> tuple[UInt8[np.ndarray, "n 32 32"], Int[np.ndarray, " n"]]:
  """Returns the letters and labels of split "train" or "val"; the splits share no face."""
  is_val = split == "val"
  began = time.monotonic()
  examples = letters.pool(
    recipe.num_val if is_val else recipe.pool,
    faces=tuple(face for face in letters.FACES if (face in recipe.val_faces) == is_val),
    seed=(recipe.seed, int(is_val)),
    coarse=recipe.coarse,
    quarter_turns=recipe.quarter_turns,
  )
  _log.info("rendered %d letters, %.0f s", len(examples[1]), time.monotonic() - began)
  return examples


@functools.partial(jax.jit, static_argnames=("backbone", "optimizer"))
def init(
  backbone: Backbone, optimizer: optax.GradientTransformation, key: PRNGKeyArray
) -> tuple[Params, optax.OptState]:
  """Returns fresh parameters of the backbone and its linear head, and the optimizer's state."""
  num_classes = len(letters.CLASSES)
  head = {
    "kernel": jnp.zeros((backbone.sizes.width, num_classes)),
    "bias": jnp.zeros(num_classes),
  }
  params = {"backbone": backbone.init(key), "head": head}
  return params, optimizer.init(params)


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
  """Returns AdamW with a learning rate that rises linearly and falls to zero along a cosine."""
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, recipe.learning_rate, recipe.warmup_steps, recipe.steps
  )
  return optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(schedule, b2=0.98, weight_decay=recipe.weight_decay, mask=_kernels),
  )


def _kernels(params: Params) -> Params:
  return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)


def make_step(backbone: Backbone, optimizer: optax.GradientTransformation, recipe: Recipe):
  """Returns (params, opt_state, grey, labels, key) -> (params, opt_state, loss); donates two."""

  def step(params, opt_state, grey, labels, key):
    images = augment(grey, key, recipe.inverted)
    targets = jax.nn.one_hot(labels, len(letters.CLASSES))
    targets = optax.smooth_labels(targets, recipe.label_smoothing)

    def loss_fn(params):
      return optax.softmax_cross_entropy(logits(backbone, params, images), targets).mean()

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss

  return jax.jit(step, donate_argnames=("params", "opt_state"))


def augment(
  grey: UInt8[Array, "B 32 32"], key: PRNGKeyArray, inverted: float
) -> Float[Array, "B 32 32 3"]:
  """Returns images in [-1, 1]: random contrast, noise and polarity."""
  contrast, strength, noise, polarity = jax.random.split(key, 4)
  shape = (len(grey), 1, 1)
  images = grey.astype(jnp.float32) / 255
  images *= jax.random.uniform(contrast, shape, minval=0.6, maxval=1.0)
  deviation = 0.2 * jax.random.uniform(strength, shape) ** 2
  images += deviation * jax.random.normal(noise, images.shape)
  images = jnp.where(jax.random.uniform(polarity, shape) < inverted, 1 - images, images)
  return pixels(images)


def pixels(grey: Float[Array, "B 32 32"]) -> Float[Array, "B 32 32 3"]:
  """Returns grey images in [0, 1] as three channels in [-1, 1]; values outside are clipped."""
  return jnp.repeat(2 * jnp.clip(grey, 0, 1)[..., None] - 1, 3, axis=-1)


def logits(
  backbone: Backbone, params: Params, images: Float[Array, "B 32 32 3"]
) -> Float[Array, "B C"]:
  """Returns the scores of the letters.CLASSES."""
  head = params["head"]
  return backbone.apply(params["backbone"], images) @ head["kernel"] + head["bias"]


def evaluate(
  backbone: Backbone,
  params: Params,
  images: UInt8[np.ndarray, "n 32 32"],
  labels: Int[np.ndarray, " n"],
) -> float:
  """Returns the accuracy in [0, 1] on the letters as rendered, without augmentation."""
  predict = jax.jit(lambda params, x: jnp.argmax(logits(backbone, params, pixels(x / 255)), -1))
  parts = np.array_split(images, max(1, len(images) // 500))
  return float(np.mean(np.concatenate([predict(params, part) for part in parts]) == labels))


def save(params: Params, path: pathlib.Path, recipe: Recipe, accuracy: float) -> None:
  """Writes the backbone as safetensors; recipe, accuracy and versions are its metadata."""
  metadata = {
    "architecture": recipe.architecture,
    "normalisation": "half",
    "made_by": "python -m fmlora_jax.pretrain",
    "recipe": json.dumps(dataclasses.asdict(recipe)),
    "val_accuracy": f"{accuracy:.4f}",
    "versions": json.dumps({name: importlib.metadata.version(name) for name in VERSIONS_OF}),
  }
  files.save(jax.device_get(params), path, metadata)
