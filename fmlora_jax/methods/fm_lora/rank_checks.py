"""Checks of the ranks that settings give or let the selector choose, before any task."""

from typing import cast

from fmlora_jax.config import Config, ConfigError
from fmlora_jax.methods.fm_lora.settings import BasesConfig, DrsConfig
from fmlora_jax.methods.fm_lora.settings import Config as Settings
from fmlora_jax.types import SequenceSpec


def check(config: Config, spec: SequenceSpec) -> None:
  """Refuses ranks that do not fit the bases or the tasks, and a selector without its images.

  Raises:
    ConfigError: if a rank is above bases.max_rank, if drs.ranks has not one rank for each task or
      another than bases.max_rank for task 1, or if a task has no validation images to select with.
  """
  settings = cast(Settings, config.method)
  bases, drs = settings.bases, settings.drs
  if drs.ranks:
    _check_given(drs.ranks, bases, spec.num_tasks)
  elif not drs.selects:
    _check_largest(drs, "rank", drs.rank, bases)
  else:
    if spec.num_tasks > 1 and not spec.has_val:
      raise ConfigError(without_val(config, "a task", spec.val_splits))
    _check_largest(drs, "candidate_ranks", drs.candidate_ranks[-1], bases)


def without_val(config: Config, who: str, val_splits: tuple[str, ...] = ()) -> str:
  """Returns the message that the selector lacks validation images, with what gives it some.

  Args:
    who: what has none: "a task".
    val_splits: of `SequenceSpec`.
  """
  chosen, drs = config.tasks, cast(Settings, config.method).drs
  others = [name for name in val_splits if name != chosen.split]
  if chosen.task_file is not None:
    gets = "set config.tasks.task_file to that of a run which had some"
  elif others:
    gets = f"set {' or '.join(f'config.tasks.split={name}' for name in others)}"
  elif chosen.split is not None or chosen.val_fraction > 0:
    gets = "add images"
  else:
    gets = "set config.tasks.val_fraction > 0, or add some where the data have a validation split"
  return (
    f"config.method.drs.strategy is {drs.strategy!r} and {who} has no validation images: {gets}; "
    "or replay the ranks of another run with config.method.drs.ranks, or set "
    "config.method.drs.strategy=fixed"
  )


def _check_given(ranks: tuple[int, ...], bases: BasesConfig, num_tasks: int) -> None:
  shown = f"config.method.drs.ranks is {ranks}: must"
  most = f"config.method.bases.max_rank = {bases.max_rank}"
  if len(ranks) != num_tasks:
    raise ConfigError(
      f"{shown} have one rank for each of the {num_tasks} tasks, has {len(ranks)}; take the ranks "
      "in the result.json of a run on as many tasks"
    )
  if max(ranks) > bases.max_rank:
    raise ConfigError(f"{shown} be at most {most}")
  if ranks[0] != bases.max_rank:
    raise ConfigError(f"{shown} begin with {most}: task 1 trains the whole bases; set one or both")


def _check_largest(drs: DrsConfig, field: str, largest: int, bases: BasesConfig) -> None:
  if largest > bases.max_rank:
    raise ConfigError(
      f"config.method.drs.{field} is {getattr(drs, field)}: must be at most "
      f"config.method.bases.max_rank = {bases.max_rank}"
    )
