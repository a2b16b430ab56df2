"""Official settings that several methods take, for the recipe "official" of config.defaults.

Sources are repository/path:line; SD is SD-Lora-CL at 8bacded.
"""

import functools
from collections.abc import Callable
from typing import Any

SPLITS = {"imagenet_r": "slice80", "cifar100": "full", "cub200": "full", "domainnet": "full"}


def like_sd_lora(**method: Any) -> dict[str, Callable[[int], dict]]:
  """Returns SD-LoRA's settings for each benchmark, T -> groups, with those of the method itself.

  Methods without an official code for a sequence of tasks take them too: the published tables' rows
  follow SD-LoRA's protocol.
  """
  return {name: functools.partial(_sd_lora, name, method) for name in SPLITS}


def _sd_lora(benchmark: str, method: dict, num_tasks: int) -> dict:
  """Source: SD/models/sdlora.py:99, SD/exps/sdlora_*.json and the rates in SD/logs."""
  rate, epochs, schedule = 8e-3, 20, {"schedule": "constant"}
  if benchmark == "imagenet_r" and num_tasks in (5, 20):
    rate = 1e-2  # 8e-3 with 10 tasks; the logs of 10 and 20 tasks bear each other's name
  if benchmark == "domainnet":  # sdlora_dom.json, for which the code has no loader
    rate, epochs = 2e-2, 10
    schedule = {"schedule": "steps", "milestones": (4, 6, 8), "decay": 0.005}
  # cub200: none, so ImageNet-R's
  return {
    "epochs": epochs,
    "batch_size": 128,
    "compute_dtype": "float32",
    "method": method,
    "optim": {
      "name": "sgd",
      "learning_rate": rate,
      "head_learning_rate": rate,
      "weight_decay": 0.0,  # commented out: the json's value is not read
      "head_weight_decay": 0.0,
      **schedule,
    },
    "input": {"augmentation": "pilot", "normalisation": "zero_one"},  # SD/utils/data.py:95-119
    "weights": {"tag": "augreg2_in21k_ft_in1k"},  # SD/logs/C100.log
    "tasks": {"split": SPLITS[benchmark]},
  }
