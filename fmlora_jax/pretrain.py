"""Pre-trains the micro ViT on rendered letters and writes the file that the library ships.

python -m fmlora_jax.pretrain --config=configs/pretrain_letters.py --output=FILE.safetensors
"""

import dataclasses
import functools
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from ml_collections import config_flags

from fmlora_jax import config as config_lib
from fmlora_jax import letters
from fmlora_jax.models import pretrained, vit
from fmlora_jax.types import Backbone, Params

_CONFIG = config_flags.DEFINE_config_file("config", "configs/pretrain_letters.py", "The recipe.")
_OUTPUT = flags.DEFINE_string("output", None, "File to write, .safetensors.", required=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
  """How the backbone is trained; AdamW with warm-up and cosine.

  Attributes:
    pool: images rendered ahead and visited again and again, each time with other brightness,
      noise and polarity.
    held_out_fonts: every n-th font is kept for validation.
    inverted: share of images shown as dark strokes on white.
  """

  architecture: str = "micro"
  seed: int = 0
  pool: int = 160_000
  num_val: int = 4_000
  held_out_fonts: int = 5
  inverted: float = 0.25
  steps: int = 6_000
  batch_size: int = 256
  learning_rate: float = 2e-3
  weight_decay: float = 0.05
  warmup_steps: int = 300
  label_smoothing: float = 0.1

  def __post_init__(self):
    for name in ("pool", "num_val", "steps", "batch_size"):
      if getattr(self, name) < 1:
        raise config_lib.ConfigError(f"{name} is {getattr(self, name)}: must be >= 1")
    if self.held_out_fonts < 2:
      raise config_lib.ConfigError(f"held_out_fonts is {self.held_out_fonts}: must be >= 2")


def train(recipe: Recipe) -> tuple[Params, float]:
  """Returns the backbone's parameters and the accuracy on letters in held-out fonts."""
  files = letters.fonts()
  held_out = files[:: recipe.held_out_fonts]
  pool = letters.render([f for f in files if f not in held_out], recipe.pool, recipe.seed)
  val = letters.render(held_out, recipe.num_val, recipe.seed + 1)
  logging.info("rendered %d and %d letters in %d fonts", recipe.pool, recipe.num_val, len(files))
  backbone = vit.make(vit.architecture(recipe.architecture))
  root = jax.random.key(recipe.seed)
  width, classes = backbone.sizes.width, len(letters.CLASSES)
  params = {
    "backbone": backbone.init(root),
    "head": {"kernel": jnp.zeros((width, classes)), "bias": jnp.zeros(classes)},
  }
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, recipe.learning_rate, recipe.warmup_steps, recipe.steps
  )
  matrices = functools.partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(schedule, b2=0.98, weight_decay=recipe.weight_decay, mask=matrices),
  )
  step = jax.jit(
    functools.partial(_step, backbone, optimizer, recipe), donate_argnames=("params", "opt_state")
  )
  opt_state = optimizer.init(params)
  rng = np.random.default_rng(recipe.seed)
  began = time.monotonic()
  for i in range(recipe.steps):
    rows = rng.integers(recipe.pool, size=recipe.batch_size)
    key = jax.random.fold_in(root, i)
    params, opt_state, loss = step(params, opt_state, pool[0][rows], pool[1][rows], key)
    if (i + 1) % 500 == 0:
      accuracy = evaluate(backbone, params, val)
      spent = time.monotonic() - began
      logging.info("step %d loss %.4f val %.4f, %.0f s", i + 1, float(loss), accuracy, spent)
  return params["backbone"], evaluate(backbone, params, val)


def _step(backbone: Backbone, optimizer, recipe: Recipe, params, opt_state, grey, labels, key):
  images = augment(grey, key, recipe.inverted)

  def loss_fn(params):
    logits = _logits(backbone, params, images)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), recipe.label_smoothing)
    return optax.softmax_cross_entropy(logits, targets).mean()

  loss, grads = jax.value_and_grad(loss_fn)(params)
  updates, opt_state = optimizer.update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state, loss


def augment(grey, key, inverted: float):
  """Returns [B, 32, 32, 3] images in [-1, 1]: random contrast, noise and polarity."""
  count = grey.shape[0]
  keys = jax.random.split(key, 4)
  shape = (count, 1, 1)
  images = grey.astype(jnp.float32) / 255
  images *= jax.random.uniform(keys[0], shape, minval=0.6, maxval=1.0)
  strength = 0.15 * jax.random.uniform(keys[1], shape) ** 2
  images += strength * jax.random.normal(keys[2], images.shape)
  images = jnp.where(jax.random.uniform(keys[3], shape) < inverted, 1 - images, images)
  return pixels(images)


def pixels(images):
  """Returns grey images in [0, 1] as three channels in [-1, 1]."""
  return jnp.repeat(2 * jnp.clip(images, 0, 1)[..., None] - 1, 3, axis=-1)


def _logits(backbone, params, images):
  return (
    backbone.apply(params["backbone"], images) @ params["head"]["kernel"] + params["head"]["bias"]
  )


def evaluate(backbone: Backbone, params: Params, examples) -> float:
  """Returns the fraction of letters that are named right."""
  grey, labels = examples
  predict = jax.jit(lambda params, x: jnp.argmax(_logits(backbone, params, pixels(x / 255.0)), -1))
  right = [
    np.asarray(predict(params, grey[i : i + 500])) == labels[i : i + 500]
    for i in range(0, len(labels), 500)
  ]
  return float(np.mean(np.concatenate(right)))


def main(argv: list[str]) -> None:
  del argv
  try:
    recipe = config_lib.build(Recipe, _CONFIG.value.to_dict())
  except config_lib.ConfigError as error:
    sys.exit(f"error: {error}")
  params, accuracy = train(recipe)
  metadata = {
    "architecture": recipe.architecture,
    "normalisation": "half",
    "recipe": json.dumps(dataclasses.asdict(recipe)),
    "val_accuracy": f"{accuracy:.4f}",
    "made_by": "python -m fmlora_jax.pretrain",
  }
  pretrained.save(jax.device_get(params), pathlib.Path(_OUTPUT.value), metadata)
  logging.info("wrote %s, letters in held-out fonts %.4f", _OUTPUT.value, accuracy)


if __name__ == "__main__":
  logging.set_verbosity(logging.INFO)
  app.run(main)
