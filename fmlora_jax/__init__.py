"""Continual learning on one frozen ViT: FM-LoRA and the methods it is compared with, in JAX.

A sequence of tasks flows through one frozen ViT that a method adapts a little at each task; what
was learned is measured, saved and reported.

  import fmlora_jax as fl
  config = fl.load_config("digits", method="lora", epochs=2, optim={"learning_rate": 3e-4})
  result = fl.run(config, "runs/mine")
  result["acc"], result["forgetting"]

Public names, imported when they are used: `Config` (the settings of a run, frozen dataclasses),
`ConfigError` (an invalid setting), `load_config` (a config file with changes -> Config), `run`
(Config, workdir -> the contents of result.json; resumes what is there) and `__version__`.

Rooms, from the commands down; each imports only from those below it:
  main, compare, prepare    commands; report, pretrain and bench are commands too (__main__.py)
  bench, pretrain           speed beside its floors; the ViT that ships with the package
  experiment                a run from its config to result.json; comparisons, estimates
  report                    finished runs side by side: tables, plots, the paper's tables
  workdir                   files of a run: checkpoints, identity, lock, log, result.json
  cli                       what commands share: flags, errors, --config, --methods, --list
  train                     step, loop, optimizer, mesh, random numbers, evaluation, metrics
  methods                   one file per method; common/ holds what several use
  models                    the ViT and the algebra that adapts it; weights/ reads published ones
  input                     images to batches on the device: resident, streaming, augmentation
  tasks                     benchmarks to sequences of tasks; tfds/ reads and builds records
  distributed               several processes as one program
  config                    the settings: schema, checks, comparison, docs
  types                     records that cross the borders of rooms
"""

import importlib
import time
from typing import Any

__version__ = "0.1.0"

# start of the program, except for that of Python: some hundredths of a second. The start of the
# process would include what its launcher did before, such as installing
BEGAN = time.monotonic()

_PUBLIC = {
  "Config": "fmlora_jax.config",
  "ConfigError": "fmlora_jax.config",
  "load_config": "fmlora_jax.cli.config_flag",
  "run": "fmlora_jax.experiment.run",
}
__all__ = ["Config", "ConfigError", "__version__", "load_config", "run"]


def __getattr__(name: str) -> Any:
  """Imports a public name when it is first used: `import fmlora_jax` alone imports no jax."""
  if name not in _PUBLIC:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(_PUBLIC[name]), name)
