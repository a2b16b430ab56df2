"""Counts without timing: the FLOPs of every method's step, and the steps that a run compiles."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from rich.table import Table

from fmlora_jax import methods
from fmlora_jax.bench import tables
from fmlora_jax.bench.workload import BenchSettings, Workload
from fmlora_jax.cli.methods_flag import Choice
from fmlora_jax.config import ConfigError
from fmlora_jax.experiment import noise
from fmlora_jax.experiment.costs import Cost
from fmlora_jax.models import vit
from fmlora_jax.train.labels import num_trained
from fmlora_jax.types import Params

RANKS = (32, 4, 8, 16, 32, 4, 8, 16, 32, 4)  # of the ten tasks whose programs are counted


def count_methods(
  setting: BenchSettings, choices: Sequence[Choice], note: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
  """Returns XLA's counts of each method's training step at two tasks; compiles it, never runs it.

  Args:
    setting: of the benchmark.
    choices: the methods. "left_out" gives the reason for each whose settings are invalid, at this
      size for instance.
    note: called before each method: some train a while before their first step.
  """
  plain = Workload(setting)
  weights = plain.weights()
  base = plain.plain_forward(weights).cost
  counted, left_out = {}, {}
  for choice in choices:
    note(f"counting {choice}")
    try:
      counted[str(choice)] = _count_method(Workload(setting, choice), weights, base)
    except ConfigError as error:
      left_out[str(choice)] = str(error)
  return tables.circumstances(setting) | {
    "forward": tables.facts(base, base),
    "methods": counted,
    "left_out": left_out,
  }


def _count_method(workload: Workload, weights: Params, base: Cost) -> dict[str, dict]:
  rows, costs = {}, {}
  for number in workload.setting.measured:
    task = number - 1
    shapes = workload.shapes(weights, task)
    rules = workload.method.rules(task)
    key = rules, str(shapes)  # tasks of one key run one program
    if key not in costs:
      costs[key] = workload.compile_step(shapes, task).cost
    trained = {"trained": num_trained(shapes[0].params, rules)}
    rows[f"task_{number}"] = tables.facts(costs[key], base) | trained
  return rows


def methods_table(result: Mapping[str, Any]) -> Table:
  """Returns the counts of `count_methods` for people."""
  lines = [tables.where(result), "x: over the plain forward; as written: before XLA's passes"]
  lines += ["rank and prompts: of fm_lora; another method's are in its row, else its defaults"]
  lines += [f"left out: {label}: {reason}" for label, reason in result["left_out"].items()]
  early, late = BenchSettings(**result["setting"]).measured
  columns = "trained", "GFLOP/image", f"x at task {early}", f"x at task {late}", "as written"
  table = tables.empty(result, "\n".join(lines), (*columns, "temp MiB"))
  table.add_row("plain forward", "-", f"{result['forward']['flops_per_image'] / 1e9:.2f}")
  for label, rows in result["methods"].items():
    first, last = (rows[f"task_{task}"] for task in (early, late))
    table.add_row(
      label,
      f"{first['trained']:,}",
      f"{first['flops_per_image'] / 1e9:.2f}",
      f"{first['ratio']:.3f}",
      f"{last['ratio']:.3f}",
      f"{first['ratio_as_written']:.3f}",
      f"{first['temp_bytes'] / 2**20:.0f}",
    )
  return table


def count_programs(ranks: Sequence[int] = RANKS) -> int:
  """Returns how many training steps a run over len(ranks) tasks compiles if task t gets ranks[t].

  The run trains a ViT of one block on noise; the number does not depend on its size. The first
  task's rank is always r_max.
  """
  setting = BenchSettings(architecture="micro", rank=max(ranks), tasks=len(ranks))
  sizes = dataclasses.replace(setting.sizes, depth=1)
  backbone = vit.make_vit(sizes)
  weights = jax.jit(backbone.init)(jax.random.key(0))
  setup = noise.make_setup(setting.config(), sizes, weights)
  trainer, method = setup.trainer, setup.method
  variables = method.init(setup.root, weights)
  for index, rank in enumerate(ranks):
    view, config = setup.views.view(index), dataclasses.replace(setting, rank=rank).config()
    ranked = methods.make_method(config, backbone, setup.sequence.spec)
    variables, _ = ranked.begin_task(variables, view)
    for state, _, _ in trainer.train(trainer.init(variables, index), variables, view):
      params = state.params
    variables, _ = method.end_task(variables.replace(**params), view)
  return setup.programs.num_compiled
