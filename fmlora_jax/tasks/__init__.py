"""Benchmarks as sequences of tasks, and the way of their images to the device."""

import difflib
import importlib
import pkgutil

from fmlora_jax.config import ConfigError, TasksConfig
from fmlora_jax.tasks.sequence import Source, Task, TaskSequence, cut

__all__ = ["Source", "Task", "TaskSequence", "benchmark_names", "make"]


def benchmark_names() -> list[str]:
  """Returns the values that config.tasks.benchmark may have: the files in benchmarks/."""
  package = importlib.import_module("fmlora_jax.tasks.benchmarks")
  return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def make(config: TasksConfig, *, seed: int, source_size: int) -> TaskSequence:
  """Returns the task sequence that `config` asks for.

  Args:
    config: names the benchmark, which is a file of that name in benchmarks/ with a function
      `make(config, source_size) -> Source`.
    seed: the run's; orders classes or domains where config.order_seed is None.
    source_size: shorter side in pixels that images are kept at.

  Raises:
    ConfigError: if there is no such benchmark, or it can't be cut into such tasks.
  """
  names = benchmark_names()
  if config.benchmark not in names:
    near = difflib.get_close_matches(config.benchmark, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(
      f"config.tasks.benchmark is {config.benchmark!r}: must be one of {', '.join(names)}{hint}"
    )
  benchmark = importlib.import_module(f"fmlora_jax.tasks.benchmarks.{config.benchmark}")
  return cut(benchmark.make(config, source_size), config, seed=seed)
