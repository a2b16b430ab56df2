"""Made-up results of finished runs in the real schema, and the report's command."""

import subprocess
import sys
import types

import numpy as np
import pytest

from fmlora_jax.report import __main__ as report
from fmlora_jax.train import metrics
from fmlora_jax.workdir import result_file


def result(method="fm_lora", seed=1993, *, tasks=5, lost=10, ranks=(8, 8, 4, 4, 4), **changes):
  """Returns a finished result; every cell has `lost` + 2 · (task distance) + seed % 7 errors."""
  n_test = np.arange(100, 100 + tasks)
  row, column = np.indices((tasks, tasks))
  correct = n_test - lost - 2 * (row - column) - seed % 7
  config = {
    "seed": seed,
    "epochs": 30,
    "method": {"name": method, "prompt": {"num_tokens": 10}},
    "tasks": {"data_dir": f"data of seed {seed}"},
    "optim": {"learning_rate": 1e-3},
  }
  for path, value in changes.pop("config", {}).items():
    *groups, name = path.split(".")
    tree = config
    for group in groups:
      tree = tree.setdefault(group, {})
    tree[name] = value
  made = dict.fromkeys(result_file.FIELDS) | metrics.summarise(np.tril(correct), n_test)
  return made | {
    "schema": result_file.SCHEMA,
    "method": method,
    "benchmark": "domainnet",
    "scenario": "cil",
    "split_id": "domainnet/cil5",
    "manifest_sha256": "ab" * 32,
    "seed": seed,
    "class_order": list(range(2 * tasks)),
    "task_names": [f"task {i}" for i in range(tasks)],
    "ranks": None if ranks is None else list(ranks),
    "params": {
      "trained": 345_678,
      "stored_total": 1_234_567,
      "stored_per_task": [12_288] * tasks,
    },
    "statistics_bytes": 0,
    "passes": {"train": 1, "test": 1, "between": 0},
    "caveats": [],
    "weights": {"tag": "augreg2", "sha256": "cd" * 32},
    "normalisation": "zero_one",
    "augmentation": "pilot",
    "epochs": 30,
    "batch_size": 128,
    "params_sha256": "ef" * 32,
    "devices": ["1 x cpu (cpu)"],
    "versions": {"jax": "0.10.2"},
    "wall_seconds": {"import": 2.1, "train": 800.0, "other": 10.2, "total": 812.3},
    "config": config,
    "finished": True,
    **changes,
  }


def comparable(method="fm_lora", seed=1993, *, tasks=10, **changes):
  """Returns a result under the protocol of the paper's ImageNet-R tables."""
  settings = {
    "benchmark": "imagenet_r",
    "split_id": f"imagenet_r/{'slice' if method == 'fm_lora' else 'slice80'}",
    "weights": {"tag": "augreg2_in21k_ft_in1k", "sha256": "5f3c" * 16},
    "batch_size": 256,
  }
  return result(method, seed, tasks=tasks, ranks=None, **settings | changes)


def save(folder, made):
  folder.mkdir(parents=True)
  result_file.write_result(folder, made)


def run_report(*argv):
  command = [sys.executable, "-m", "fmlora_jax.report", *map(str, argv)]
  return subprocess.run(command, capture_output=True, text=True, check=False)


def refusal(*paths, **options):
  """Returns why the report's command refuses these paths and flags."""
  flags = {"plot": None, "html": None, "share": None, "paper": False, "markdown": False} | options
  with pytest.raises((ValueError, OSError)) as error:
    report.report([str(path) for path in paths], types.SimpleNamespace(**flags))
  return str(error.value)
