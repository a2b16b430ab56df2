"""CUB-200-2011: 11,788 photographs of 200 bird species.

Source: C. Wah et al. (2011), The Caltech-UCSD Birds-200-2011 Dataset; TFDS `caltech_birds2011`.
"""

from fmlora_jax.config import TasksConfig
from fmlora_jax.tasks import splits
from fmlora_jax.tasks.sequence import DataSource
from fmlora_jax.tasks.tfds.source import PublishedSplit, make_source

BUILDERS = ("caltech_birds2011",)
PUBLISHED = {"train": 5_994, "test": 5_794}
SPLITS = {
  # of the two published splits put together, as PILOT pools them; the split of FM-LoRA's cell
  "paper": splits.sliced(70, 80),
  "full": splits.sliced(80, 80),  # the same, with val in train: that of the table's baseline rows
  "official": splits.official(10),  # 30 training images a class in place of 47: much harder
}


def make(config: TasksConfig, source_size: int) -> DataSource:
  """Returns the published training images, then the published test images."""
  published = [
    PublishedSplit("caltech_birds2011", split, count) for split, count in PUBLISHED.items()
  ]
  return make_source(config, source_size, published, rules=SPLITS)
