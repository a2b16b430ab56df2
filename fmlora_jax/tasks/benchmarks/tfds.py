"""Any classification set that TFDS knows and has prepared: tasks.benchmark = "tfds:NAME"."""

from fmlora_jax.config import TasksConfig
from fmlora_jax.tasks.sequence import DataSource
from fmlora_jax.tasks.tfds import source


def make(config: TasksConfig, source_size: int) -> DataSource:
  """Returns its splits train, validation and test; a set with one split is cut as the config says.

  Raises:
    ConfigError: if it has none of them, or not exactly one kind of image and one of label.
  """
  name = config.benchmark.removeprefix("tfds:")
  parts = [source.PublishedSplit(name, split) for split in source.published(name, config)]
  return source.source(config, source_size, parts)
