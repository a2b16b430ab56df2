"""Benchmarks as task sequences."""

import difflib
import importlib
import pkgutil
import types
from collections.abc import Sequence
from typing import cast

from fmlora_jax.config import ConfigError, TasksConfig
from fmlora_jax.tasks import splits, task_file
from fmlora_jax.tasks.copies import report_copies
from fmlora_jax.tasks.sequence import (
  TEST,
  TRAIN,
  VAL,
  DataSource,
  Task,
  TaskSequence,
  check_divides,
  check_test_from,
  make_sequence,
)

__all__ = [
  "DataSource",
  "Task",
  "TaskSequence",
  "benchmark_names",
  "check",
  "is_prepared",
  "make",
  "missing_data",
  "num_classes",
  "val_splits",
]


def benchmark_names() -> list[str]:
  """Returns the values of config.tasks.benchmark: the names of the files in benchmarks/."""
  package = importlib.import_module("fmlora_jax.tasks.benchmarks")
  return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def make(
  config: TasksConfig, *, seed: int, source_size: int, source: DataSource | None = None
) -> TaskSequence:
  """Returns the task sequence that `config` asks for.

  Args:
    config: names the benchmark: a file in benchmarks/ with a function
      `make(config, source_size) -> DataSource` and, where they apply, tables of the names that
      config.split (SPLITS) and config.domains (DOMAINS) may have, or NUM_CLASSES where it is known
      without the data.
    seed: the run's; orders classes or domains where config.order_seed is None, unless
      config.task_file is given.
    source_size: shorter side in pixels that images are resized to.
    source: of another sequence with this config and size, so that the data are read once.

  Raises:
    ConfigError: if there is no such benchmark, or it can't be cut into such tasks.
  """
  is_first_use = source is None
  module, fields = find(config.benchmark), None
  if config.task_file is not None:
    fields = task_file.load(config)
    config = task_file.with_division(config, fields, getattr(module, "SPLITS", ()))
  if source is None:
    check(config)
    source = cast(DataSource, module.make(config, source_size))
  if fields is None:
    sequence = make_sequence(source, config, seed=seed)
  else:
    sequence = task_file.to_sequence(fields, source, config)
  report_copies(sequence, config, warn=is_first_use)
  return sequence


def check(config: TasksConfig) -> None:
  """Refuses invalid settings before the data are read.

  Raises:
    ConfigError: if there is no such benchmark, split or domain, if the number of classes that the
      benchmark's file declares does not fit the number of tasks, or if the task file is of others.
  """
  wanted = [] if config.split is None else [config.split]
  check_names(config.benchmark, "SPLITS", wanted, "config.tasks.split is")
  check_names(config.benchmark, "DOMAINS", config.domains, "config.tasks.domains is")
  if getattr(find(config.benchmark), "SPLITS", ()):
    check_test_from(config, {TRAIN, VAL, TEST})  # each of these splits has test images
  if not is_prepared(config.benchmark) and not hasattr(find(config.benchmark), "check_folder"):
    if config.data_dir is not None:
      raise ConfigError(
        f"config.tasks.data_dir is {config.data_dir!r}: must be None, the images of "
        f"{config.benchmark} are not in a folder; leave it out, or set config.tasks.benchmark to "
        "image_folder for images of your own"
      )
    check_test_from(config, ())  # a split is drawn from all images
  count = num_classes(config.benchmark)
  if count and config.scenario != "dil":
    check_divides(config.num_tasks, count, config.benchmark)
  if config.task_file is not None:
    task_file.load(config)


def missing_data(config: TasksConfig) -> list[str]:
  """Returns what is missing of the data, a line each, with what gets it; reads no image."""
  module, root = find(config.benchmark), config.data_dir
  names = [n for n in getattr(module, "BUILDERS", ()) if _is_wanted(n, config.domains)]
  if config.benchmark.startswith("tfds:"):
    names = [config.benchmark.removeprefix("tfds:")]
  if names:
    from fmlora_jax.tasks.tfds import prepared  # TFDS takes a second to import

    return prepared.missing(names, prepared.data_root(root), config.benchmark)
  if hasattr(module, "check_folder"):
    try:
      module.check_folder(root)
    except ConfigError as error:
      return [str(error)]
  return []


def is_prepared(benchmark: str) -> bool:
  """Returns whether the command `prepare` makes the benchmark."""
  return benchmark.startswith("tfds:") or hasattr(find(benchmark), "BUILDERS")


def _is_wanted(builder: str, domains: Sequence[str]) -> bool:
  return not domains or builder.rpartition("/")[2] in domains


def num_classes(benchmark: str) -> int | None:
  """Returns the number of classes of a benchmark that ships its data; None for others."""
  return getattr(find(benchmark), "NUM_CLASSES", None)


def val_splits(benchmark: str) -> tuple[str, ...]:
  """Returns the values of config.split with which a benchmark has validation images."""
  return splits.with_val(getattr(find(benchmark), "SPLITS", {}))


def find(name: str, shown: str = "config.tasks.benchmark") -> types.ModuleType:
  """Returns the module in benchmarks/ for the value of a field or flag, `shown` in messages.

  Raises:
    ConfigError: if there is none.
  """
  names = benchmark_names()
  file = "tfds" if name.startswith("tfds:") else name
  if file not in names or name == "tfds":
    near = difflib.get_close_matches(name.lower(), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    names = ", ".join("tfds:NAME" if each == "tfds" else each for each in names)
    raise ConfigError(f"{shown} is {name!r}: must be one of {names}{hint}")
  return importlib.import_module(f"fmlora_jax.tasks.benchmarks.{file}")


def check_names(benchmark: str, table: str, names: Sequence[str], shown: str) -> None:
  """Refuses names that are not in a table of the benchmark; `shown` begins the message.

  Raises:
    ConfigError: with what is allowed.
  """
  known = getattr(find(benchmark), table, ())
  allowed = f"one of {', '.join(known)}" if known else f"left out: {benchmark} has none"
  for name in names:
    if name not in known:
      raise ConfigError(f"{shown} {name!r}: must be {allowed}")
