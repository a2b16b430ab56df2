"""ImageNet-R: 30,000 renditions of 200 ImageNet classes, all in one published split.

Source: D. Hendrycks et al. (2021), arXiv:2006.16241; TFDS `imagenet_r`.
"""

from fmlora_jax.config import TasksConfig
from fmlora_jax.tasks import splits
from fmlora_jax.tasks.sequence import DataSource
from fmlora_jax.tasks.tfds.source import PublishedSplit, make_source

BUILDERS = ("imagenet_r",)
SPLITS = {
  # the 70/10/20 that FM-LoRA's paper states: the split of its cells; its test images are those of
  # L2P and DualPrompt
  "slice": splits.sliced(70, 80),
  "slice80": splits.sliced(80, 80),  # the same, with val in train: that of the baseline rows
  "stratified": splits.stratified,
  "coda": splits.listed(  # CODA-Prompt's and InfLoRA's, whose lists are not ours to ship
    train="imagenet-r_train.yaml",
    test="imagenet-r_test.yaml",
    source="github.com/GT-RIPL/CODA-Prompt, dataloaders/splits",
  ),
}


def make(config: TasksConfig, source_size: int) -> DataSource:
  """Returns the 200 classes that have images, of the 1,000 that TFDS numbers."""
  published = [PublishedSplit("imagenet_r", "test", num_published=30_000)]
  return make_source(config, source_size, published, rules=SPLITS)
