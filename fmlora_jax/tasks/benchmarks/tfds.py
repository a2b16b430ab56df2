"""Any classification set that TFDS knows and has prepared: tasks.benchmark = "tfds:NAME"."""

from fmlora_jax.config import TasksConfig
from fmlora_jax.tasks.sequence import DataSource
from fmlora_jax.tasks.tfds.source import PublishedSplit, make_source, usable_splits


def make(config: TasksConfig, source_size: int) -> DataSource:
  """Returns the splits train, validation and test; of a set with one split the config draws them.

  Raises:
    ConfigError: if it has none of them, or not one feature with images and one with labels.
  """
  name = config.benchmark.removeprefix("tfds:")
  published = [PublishedSplit(name, split) for split in usable_splits(name, config)]
  return make_source(config, source_size, published)
