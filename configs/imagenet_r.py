"""ImageNet-R in 5, 10 or 20 tasks of 40, 20 or 10 classes: Table 1 of FM-LoRA.

python -m fmlora_jax.prepare imagenet_r --data_dir=DIR
python -m fmlora_jax.main --config=configs/imagenet_r.py:tasks=20 --config.tasks.data_dir=DIR

FM-LoRA's rows have split=slice, the 70/10/20 that the paper states. The table's other rows were
trained on 80 % of the images, without validation: split=slice80, with the same test images. Ranks
that a run selected on slice are replayed there: --config.method.drs.ranks="(32,8,...)", one a task.
"""

from fmlora_jax.cli import config_files


def get_config(variant: str | None = None):
  """Returns the config; variants: method=NAME, tasks=5|10|20, split=slice|slice80|stratified|coda,
  recipe=unified|official.
  """
  return config_files.paper(variant, benchmark="imagenet_r", num_tasks=10, split="slice")
