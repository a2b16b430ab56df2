"""What a config is refused for before any file is read and any device is touched."""

import dataclasses
import os

import jax
import jax.numpy as jnp

from fmlora_jax import methods, tasks
from fmlora_jax.config import Config, ConfigError
from fmlora_jax.models import pretrained, vit
from fmlora_jax.tasks import augment
from fmlora_jax.types import Method, SequenceSpec, Sizes


def check(config: Config) -> None:
  """Refuses what needs no look at data or weights to be refused.

  Raises:
    ConfigError: if names are unknown, classes can't be cut into so many tasks, settings of the
      method do not fit the ViT, or its variables the memory of this machine.
  """
  tasks.check(config.tasks)
  augment.check(config.input.augmentation, config.input.normalisation or "half")
  sizes = pretrained.check(config.weights, config.input.image_size)
  if sizes is not None:
    _check_method(config, sizes)


def _check_method(config: Config, sizes: Sizes) -> None:
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
  backbone = vit.make(sizes, jnp.dtype(config.compute_dtype))
  _check_memory(config, methods.make(config, backbone, spec), backbone)


def _check_memory(config: Config, method: Method, backbone) -> None:
  """Refuses settings of a method that alone make more numbers than this machine can hold."""

  def init():
    key = jax.random.key(0)
    return method.init(key, backbone.init(key))

  leaves = jax.tree.leaves(jax.eval_shape(init))
  needed = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
  there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  if needed > there:
    own = dataclasses.asdict(config.method)
    whole = {name: value for name, value in own.items() if type(value) is int}
    name = max(whole, key=whole.get)
    raise ConfigError(
      f"config.method.{name} is {whole[name]}: must be less, what {config.method.name} learns "
      f"would take {needed / 2**30:.3g} GiB and this machine has {there / 2**30:.3g}"
    )
