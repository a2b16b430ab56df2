"""Any classification set that TFDS knows and has prepared: tasks.benchmark = "tfds:NAME"."""

from fmlora_jax.config import TasksConfig
from fmlora_jax.tasks.sequence import DataSource
from fmlora_jax.tasks.tfds.source import make_source, usable_splits


def make(config: TasksConfig, source_size: int) -> DataSource:
  """Returns the labelled splits as `usable_splits` has them; the config draws those that lack.

  Raises:
    ConfigError: if it has none of them, or not one feature with images and one with labels.
  """
  name = config.benchmark.removeprefix("tfds:")
  return make_source(config, source_size, usable_splits(name, config))
