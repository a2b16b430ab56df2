"""Preflight checks of a config, before a file is read or a device is used."""

import dataclasses

import jax
import jax.numpy as jnp

from fmlora_jax import methods, tasks
from fmlora_jax.config import Config, ConfigError, raise_problems
from fmlora_jax.input import augment
from fmlora_jax.methods.common.base import AdaptedViT
from fmlora_jax.models import vit
from fmlora_jax.models.weights import download, registry
from fmlora_jax.types import Backbone, SequenceSpec, Sizes


def check(config: Config, memory: int) -> None:
  """Refuses a config that is invalid whatever data and weights hold.

  Args:
    memory: bytes of this machine.

  Raises:
    ConfigError: if a name is unknown, the classes do not make so many tasks, settings of the method
      do not fit the ViT, or its variables do not fit the memory; also if jax computes in float64.
  """
  if jax.config.values["jax_enable_x64"]:
    raise ConfigError("JAX_ENABLE_X64 is True: must be False, parameters are float32; unset it")
  tasks.check(config.tasks)
  augment.check(config.input.augmentation, config.input.normalisation or "half")
  sizes = registry.check(config.weights, config.input.image_size)
  if sizes is not None:
    _check_method(config, sizes, memory)


def check_files(config: Config) -> None:
  """Refuses a config whose data or weights are missing, with all that is and what gets it.

  Raises:
    ConfigError: with a line for each.
  """
  if problems := missing_files(config):
    raise_problems(problems)


def missing_files(config: Config) -> list[str]:
  """Returns what is missing of a config's data and weights, a line each, with what gets it.

  Weights that are the only thing that is missing may be downloaded.
  """
  data, weights = tasks.missing_data(config.tasks), registry.missing(config.weights)
  if data or (weights and (config.weights.path is not None or not download.has_hub())):
    is_prepared = tasks.is_prepared(config.tasks.benchmark)
    if data and weights and config.weights.path is None and is_prepared:
      root = f" --data_dir={config.tasks.data_dir}" if config.tasks.data_dir else ""
      both = f"fmlora_jax prepare {config.tasks.benchmark}{root} --with_weights"
      weights[0] += f"; {both} gets them with the data"
    return [*data, *weights]
  return []


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
    has_val=_may_have_val(config),
    val_splits=tasks.val_splits(config.tasks.benchmark),
  )
  backbone = vit.make_vit(sizes, jnp.dtype(config.compute_dtype))
  _check_memory(config, methods.make_method(config, backbone, spec), backbone, memory)


def _may_have_val(config: Config) -> bool:
  """Returns False where a named split has no validation image; other data are not read here."""
  chosen, names = config.tasks, tasks.val_splits(config.tasks.benchmark)
  return not names or chosen.split is None or chosen.split in names or chosen.task_file is not None


def _check_memory(config: Config, method: AdaptedViT, backbone: Backbone, memory: int) -> None:
  """Refuses settings of a method whose variables do not fit the memory of this machine."""

  def init():
    key = jax.random.key(0)
    return method.init(key, backbone.init(key))

  leaves = jax.tree.leaves(jax.eval_shape(init))
  needed = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
  if needed > memory:
    settings = dataclasses.asdict(config.method)
    sizes = {f"method.{name}": value for name, value in settings.items() if type(value) is int}
    if config.head.alignment.epochs:
      sizes["head.num_centroids"] = config.head.num_centroids
    field, value = "tasks.num_tasks", config.tasks.num_tasks
    if sizes:
      field = max(sizes, key=lambda name: sizes[name])
      value = sizes[field]
    raise ConfigError(
      f"config.{field} is {value}: must be less, what {config.method.name} learns would take "
      f"{needed / 2**30:.3g} GiB and this machine has {memory / 2**30:.3g}"
    )
