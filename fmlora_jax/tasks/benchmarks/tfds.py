"""Any classification set that TFDS knows and has prepared: tasks.benchmark = "tfds:NAME"."""

from fmlora_jax.config import TasksConfig
from fmlora_jax.tasks import records
from fmlora_jax.tasks.sequence import Source


def make(config: TasksConfig, source_size: int) -> Source:
  """Returns its splits train, validation and test; a set with one split is cut as the config says.

  Raises:
    ConfigError: if it has none of them, or not exactly one kind of image and one of label.
  """
  name = config.benchmark.removeprefix("tfds:")
  parts = [records.Part(name, split) for split in records.published(name, config)]
  return records.source(config, source_size, parts)
