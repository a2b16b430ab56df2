"""What a config is refused for before any file is read and any device is touched."""

import dataclasses

import jax
import jax.numpy as jnp

from fmlora_jax import methods, tasks
from fmlora_jax.config import Config, ConfigError
from fmlora_jax.input import augment
from fmlora_jax.models import vit
from fmlora_jax.models.weights import registry
from fmlora_jax.types import Backbone, Method, SequenceSpec, Sizes


def check(config: Config, memory: int) -> None:
  """Refuses what needs no look at data or weights to be refused.

  Args:
    memory: bytes that this machine has.

  Raises:
    ConfigError: if names are unknown, classes can't be cut into so many tasks, settings of the
      method do not fit the ViT, or its variables the memory of this machine.
  """
  tasks.check(config.tasks)
  augment.check(config.input.augmentation, config.input.normalisation or "half")
  sizes = registry.check(config.weights, config.input.image_size)
  if sizes is not None:
    _check_method(config, sizes, memory)


def _check_method(config: Config, sizes: Sizes, memory: int) -> None:
  num_tasks = config.tasks.num_tasks
  num_classes = tasks.num_classes(config.tasks.benchmark) or num_tasks
  each = num_classes // num_tasks
  is_dil = config.tasks.scenario == "dil"
  ranges = [(0, num_classes) if is_dil else (i * each, (i + 1) * each) for i in range(num_tasks)]
  spec = SequenceSpec(
    scenario=config.tasks.scenario,
    num_tasks=num_tasks,
    num_classes=num_classes,
    class_ranges=tuple(ranges),
  )
  backbone = vit.make_vit(sizes, jnp.dtype(config.compute_dtype))
  _check_memory(config, methods.make_method(config, backbone, spec), backbone, memory)


def _check_memory(config: Config, method: Method, backbone: Backbone, memory: int) -> None:
  """Refuses settings of a method that alone make more numbers than this machine can hold."""

  def init():
    key = jax.random.key(0)
    return method.init(key, backbone.init(key))

  leaves = jax.tree.leaves(jax.eval_shape(init))
  needed = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
  if needed > memory:
    own = dataclasses.asdict(config.method)
    whole = {f"method.{name}": value for name, value in own.items() if type(value) is int}
    if config.head.alignment.epochs:
      whole["head.num_centroids"] = config.head.num_centroids
    field, value = "tasks.num_tasks", config.tasks.num_tasks
    if whole:
      field = max(whole, key=lambda name: whole[name])
      value = whole[field]
    raise ConfigError(
      f"config.{field} is {value}: must be less, what {config.method.name} learns would take "
      f"{needed / 2**30:.3g} GiB and this machine has {memory / 2**30:.3g}"
    )
