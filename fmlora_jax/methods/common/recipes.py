"""Official settings that several methods share, for the recipe "official" of config files.

Sources in this folder are REPOSITORY/path:line of public code on GitHub:
  CO  GT-RIPL/CODA-Prompt at 6417d4f
  HD  thu-ml/HiDe-Prompt at 0ed4333
  IL  liangyanshuo/InfLoRA at e08b00e
  LP  google-research/l2p at dd8836e
  PI  sun-hailong/LAMDA-PILOT at 5240714
  SD  WuYichen-97/SD-Lora-CL at 8bacded

Exceptions, where every official recipe differs from the codes; each method's file lists its own:
  - Batches, crops and initial values are drawn by JAX: the same laws, never the same draws.
  - Random crops are cut from images whose shorter side was reduced to `input.source_size` before.
  - ImageNet-R is split 80/20 as by LP. CO and IL have lists of their own (tasks.split=coda, with
    their files), PI and SD folders. CUB-200 is split 80/20 too, where HD takes the published split.
  - An epoch's last batch is padded, and the rest of its images count; LP and CO leave them out.
"""

import functools
from collections.abc import Callable
from typing import Any

SPLITS = {"imagenet_r": "slice80", "cifar100": "full", "cub200": "full", "domainnet": "full"}


def optim(name: str, learning_rate: float, **changes: Any) -> dict[str, Any]:
  """Returns `config.optim` at one constant rate, without weight decay, with changes."""
  return {
    "name": name,
    "learning_rate": learning_rate,
    "head_learning_rate": learning_rate,
    "weight_decay": 0.0,
    "head_weight_decay": 0.0,
    "schedule": "constant",
  } | changes


def like_sd_lora(**method: Any) -> dict[str, Callable[[int], dict]]:
  """Returns SD-LoRA's settings for each benchmark, T -> groups, and those of a method.

  Methods without official code for a sequence of tasks take them too: the rows of the published
  tables follow SD-LoRA's protocol.
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
    "head": {"start": "kaiming_uniform"},  # SD/backbone/linears.py:27-29
    "optim": optim("sgd", rate, **schedule),  # decay commented out: the json's value is not read
    "input": {"augmentation": "pilot", "normalisation": "zero_one"},  # SD/utils/data.py:95-119
    "weights": {"tag": "augreg2_in21k_ft_in1k"},  # SD/logs/C100.log
    "tasks": {"split": SPLITS[benchmark]},
  }


def like_inflora(benchmark: str, *, optim: dict, method: dict) -> dict[str, Any]:
  """Returns the settings that all runs of InfLoRA's code share, and those of a method."""
  # IL/configs/{mimg10,cifar100,domainnet}_inflora.json; cub200: none, so ImageNet-R's
  epochs = {"imagenet_r": 50, "cifar100": 20, "cub200": 50, "domainnet": 5}[benchmark]
  # IL/utils/data.py:44-57, 111-178, 281-292
  augmentation = {"cub200": "pilot", "cifar100": "coda_uncropped"}.get(benchmark, "coda")
  return {
    "epochs": epochs,
    "batch_size": 128,
    "compute_dtype": "float32",
    "method": method,
    "head": {"start": "torch_linear"},  # IL/models/sinet_inflora.py:74-77
    "optim": optim,
    "input": {"augmentation": augmentation, "normalisation": "zero_one"},
    "weights": {"tag": "augreg_in21k"},  # IL/models/sinet_inflora.py:68
    "tasks": {"order": "natural", "split": SPLITS[benchmark]},  # "shuffle": false
  }
