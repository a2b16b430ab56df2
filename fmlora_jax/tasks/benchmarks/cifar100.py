"""CIFAR-100: 60,000 images of 32 x 32 pixels in 100 classes.

Source: A. Krizhevsky (2009), Learning Multiple Layers of Features from Tiny Images;
TFDS `cifar100`.
"""

from fmlora_jax.config import TasksConfig
from fmlora_jax.tasks import splits
from fmlora_jax.tasks.sequence import DataSource
from fmlora_jax.tasks.tfds.source import PublishedSplit, make_source

BUILDERS = ("cifar100",)
PUBLISHED = {"train": 50_000, "test": 10_000}
SPLITS = {
  # the paper says "similar splits" to 70/10/20: val is out of train, and test is what all rows of
  # the table are measured on, so this is the split of FM-LoRA's cell
  "official": splits.official(10),
  "full": splits.published,  # the budget of the table's baseline rows
  "paper": splits.stratified,  # 70/10/20 of all 60,000: comparable with nobody's numbers
}


def make(config: TasksConfig, source_size: int) -> DataSource:
  """Returns the training images, then the test images."""
  published = [PublishedSplit("cifar100", split, count) for split, count in PUBLISHED.items()]
  return make_source(config, source_size, published, rules=SPLITS)
