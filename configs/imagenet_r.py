"""ImageNet-R in 5, 10 or 20 tasks of 40, 20 or 10 classes: Table 1 of FM-LoRA.

python -m fmlora_jax.prepare imagenet_r --data_dir=DIR
python -m fmlora_jax.main --config=configs/imagenet_r.py:tasks=20 --config.tasks.data_dir=DIR

The table's other rows were trained on 80 % of the images, without validation: choose settings on
split=slice, then compare on split=slice80, which has the same test images. It has no validation
images to select ranks on: --config.method.drs.strategy=fixed.
"""

from fmlora_jax.cli import config_files


def get_config(variant: str | None = None):
  """Returns the config; variants: method=NAME, tasks=5|10|20, split=slice|slice80|stratified|coda,
  recipe=unified|official.
  """
  return config_files.paper(variant, benchmark="imagenet_r", num_tasks=10, split="slice")
