"""What XLA says of compiled steps: the FLOPs of every method's, and how many a run compiles."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table

from fmlora_jax import config as config_lib
from fmlora_jax import methods
from fmlora_jax.bench import tables
from fmlora_jax.bench.lab import BenchSettings, Program, Workload
from fmlora_jax.cli.methods_flag import Choice
from fmlora_jax.config import Config
from fmlora_jax.experiment.setup import SetupCache
from fmlora_jax.models import vit
from fmlora_jax.types import Params

RANKS = (32, 4, 8, 16, 32, 4, 8, 16, 32, 4)  # of the ten tasks whose programs are counted


def count_methods(
  setting: BenchSettings, choices: Sequence[Choice], note: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
  """Returns what XLA says of each method's compiled training step at two tasks; none is run.

  "left_out" says why of those whose settings can't be, at this size for instance; `note` is told
  which method's turn it is: some train a while before their first step.
  """
  plain = Workload(setting)
  weights = plain.weights()
  base = plain.plain_forward(weights).facts
  counted, left_out = {}, {}
  for choice in choices:
    note(f"counting {choice}")
    try:
      counted[str(choice)] = _count_method(Workload(setting, choice), weights, base)
    except config_lib.ConfigError as error:
      left_out[str(choice)] = str(error)
  return tables.circumstances(setting) | {"forward": base, "methods": counted, "left_out": left_out}


def _count_method(lab: Workload, weights: Params, base: Mapping[str, Any]) -> dict[str, dict]:
  rows, programs = {}, {}
  for task in lab.setting.measured:
    shapes = lab.shapes(weights, task - 1)
    same = lab.method.rules(task - 1), str(shapes)  # then both tasks run one program
    if same not in programs:
      step = lab.stepper(task - 1).step
      programs[same] = Program(step, lab.setting.batch, *shapes, donate=(0,)).facts
    trained = {"trained": lab.num_trained(shapes[0], task - 1)}
    rows[f"task_{task}"] = tables.with_ratios(programs[same], base) | trained
  return rows


def methods_table(result: Mapping[str, Any]) -> Table:
  """Returns what `count_methods` counted for people."""
  lines = [tables.where(result), "x: over the plain forward; as written: before XLA's passes"]
  lines += [f"left out: {label}: {reason}" for label, reason in result["left_out"].items()]
  early, late = BenchSettings(**result["setting"]).measured
  columns = "trained", "GFLOP/image", f"x at task {early}", f"x at task {late}", "as written"
  shown = tables.empty(result, "\n".join(lines), (*columns, "temp MiB"))
  shown.add_row("plain forward", "-", f"{result['forward']['flops_per_image'] / 1e9:.2f}")
  for label, rows in result["methods"].items():
    first, last = (rows[f"task_{task}"] for task in (early, late))
    shown.add_row(
      label,
      f"{first['trained']:,}",
      f"{first['flops_per_image'] / 1e9:.2f}",
      f"{first['ratio']:.3f}",
      f"{last['ratio']:.3f}",
      f"{first['ratio_as_written']:.3f}",
      f"{first['temp_bytes'] / 2**20:.0f}",
    )
  return shown


def count_programs(ranks: Sequence[int] = RANKS) -> int:
  """Returns how many training steps a run over len(ranks) tasks compiles if task t gets ranks[t].

  The run is a real one on a ViT of one block; what is compiled does not depend on its size. The
  first task's rank is always r_max.
  """
  config = config_lib.build(
    Config,
    {
      "epochs": 1,
      "batch_size": 256,
      "compute_dtype": "float32",
      "weights": {"tag": "random", "architecture": "micro", "depth": 1},
      "tasks": {"benchmark": "digits", "num_tasks": len(ranks)},
      "input": {"augmentation": "none", "normalisation": "half", "steps_per_dispatch": 1},
      "bases": {"max_rank": max(ranks)},
      "drs": {"strategy": "fixed", "rank": max(ranks)},
    },
  )
  setup = SetupCache().setup(config)
  trainer, backbone, method = setup.trainer, vit.make_vit(setup.sizes), setup.method

  def with_rank(rank):
    drs = dataclasses.replace(config.method.drs, rank=rank)
    changed = dataclasses.replace(config, method=dataclasses.replace(config.method, drs=drs))
    return methods.make_method(changed, backbone, setup.sequence.spec)

  variables = method.init(setup.root, setup.weights)
  for index, rank in enumerate(ranks):
    view = setup.views.view(index)
    variables, _ = with_rank(rank).begin_task(variables, view)
    for state, _, _ in trainer.train(trainer.init(variables, index), variables, view):
      params = state.params
    variables, _ = method.end_task(variables.replace(**params), view)
  return setup.programs.num_compiled
