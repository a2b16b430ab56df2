"""What a training step costs early and late in a sequence: FLOPs, time, memory.

python -m fmlora_jax.bench [--architecture=vit_b16] [--batch=8] [--dtype=float32] [--rank=16]
  [--prompts=10] [--repeats=5] [--peers [--peers_python=FILE]] [--json=FILE]
python -m fmlora_jax.bench --methods=all|NAME,NAME:FIELD=VALUE,... [--batch=8] [--json=FILE]

The ViT and the images are random; method, step and optimiser are those of a run. The first command
measures FM-LoRA; with --peers the same work is done by Hugging Face's ViT with PEFT's LoRA in
PyTorch (bench_peer.py), turn by turn. With --methods, named as for fmlora_jax.compare, XLA counts
the FLOPs of each method's compiled step; no step is done.
"""

import dataclasses
import functools
import importlib.metadata
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from rich import box
from rich.console import Console
from rich.table import Table

from fmlora_jax import config as config_lib
from fmlora_jax import methods, settings, tasks
from fmlora_jax.bench_peer import Peer
from fmlora_jax.config import Config
from fmlora_jax.methods import frame
from fmlora_jax.methods.rules import label_leaves, partition
from fmlora_jax.models import pretrained, vit
from fmlora_jax.settings import Choice
from fmlora_jax.tasks import augment
from fmlora_jax.train import mesh
from fmlora_jax.train.loop import Trainer
from fmlora_jax.train.step import Fixed, Stepper, TrainState
from fmlora_jax.train.streams import stream_key
from fmlora_jax.types import (
  Batch,
  Examples,
  Params,
  SequenceSpec,
  Sizes,
  TaskArrays,
  TaskView,
  Variables,
)

NUM_TASKS, TASK_CLASSES = 20, 10
TASKS = (2, 20)  # counted from 1
RANKS = (32, 4, 8, 16, 32, 4, 8, 16, 32, 4)  # of the ten tasks whose programs are counted
TURN_SECONDS = 0.5  # a turn has as many steps as take this long

FM_LORA = Choice("fm_lora")
METHOD_COLUMNS = (
  *("trained", "GFLOP/image", *(f"x at task {task}" for task in TASKS)),
  *("as written", "temp MiB"),
)
COLUMNS = ("GFLOP/image", "x forward", "compile s", "ms", "images/s", "temp MiB", "MFU", "ours/it")

PEAK_FLOPS = (  # bfloat16 products per second without sparsity, as the makers state; first match
  ("H100 PCIe", 756e12),
  ("H100", 989e12),
  ("H200", 989e12),
  ("A100", 312e12),
  ("TPU v6", 918e12),
  ("TPU v5 lite", 197e12),
  ("TPU v5e", 197e12),
  ("TPU v5", 459e12),
  ("TPU v4", 275e12),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
  """What is measured; the flags of the same names."""

  architecture: str = "vit_b16"
  batch: int = 8
  dtype: str = "float32"
  rank: int = 16
  prompts: int = 10

  @property
  def sizes(self) -> Sizes:
    return vit.architecture(self.architecture)

  def config(self, choice: Choice = FM_LORA) -> Config:
    """Returns the config of a run that gives FM-LoRA's tasks from the second on the rank `rank`."""
    values = {
      "epochs": 1,
      "method": {"name": choice.name},
      "batch_size": self.batch,
      "compute_dtype": self.dtype,
      "bases": {"max_rank": max(32, self.rank)},
      "drs": {"strategy": "fixed", "rank": self.rank},
      "prompt": {"num_tokens": self.prompts},
    }
    return settings.read_config(choice.flags(), config_lib.defaults(**values))


class Program:
  """A compiled function and what XLA says of it.

  Attributes:
    facts: compile_seconds, flops_per_image as compiled, flops_per_image_as_written (before XLA's
      passes; what GPU libraries do counts here only), temp_bytes.
  """

  def __init__(self, function: Callable, batch: int, *arguments, donate: tuple[int, ...] = ()):
    began = time.monotonic()
    lowered = jax.jit(function, donate_argnums=donate).lower(*arguments)
    self._run = lowered.compile()
    self._arguments = arguments
    self.facts = {
      "flops_per_image": self._run.cost_analysis()["flops"] / batch,
      "flops_per_image_as_written": lowered.cost_analysis()["flops"] / batch,
      "compile_seconds": time.monotonic() - began,
      "temp_bytes": self._run.memory_analysis().temp_size_in_bytes,
    }

  def __call__(self, steps: int) -> float:
    """Returns the seconds that `steps` runs take; a state that comes back goes into the next."""
    began = time.monotonic()
    for _ in range(steps):
      result = self._run(*self._arguments)
      if isinstance(result, tuple):
        self._arguments = result[0], *self._arguments[1:]
    jax.block_until_ready(result)
    return time.monotonic() - began


class Lab:
  """A method on 20 tasks of 10 new classes, at the start of any of them.

  Tasks are counted from 0 here.
  """

  def __init__(self, setting: Setting, choice: Choice = FM_LORA):
    self.setting, self.config = setting, setting.config(choice)
    starts = range(0, NUM_TASKS * TASK_CLASSES, TASK_CLASSES)
    self.spec = SequenceSpec(
      scenario="cil",
      num_tasks=NUM_TASKS,
      num_classes=NUM_TASKS * TASK_CLASSES,
      class_ranges=tuple((lo, lo + TASK_CLASSES) for lo in starts),
    )
    self.backbone = vit.make(setting.sizes, jnp.dtype(setting.dtype))
    self.method = methods.make(self.config, self.backbone, self.spec)
    self._root = jax.random.key(0)
    pixels = {
      "size": setting.sizes.image_size,
      "augmentation": self.config.input.augmentation,
      "normalisation": "half",
      "dtype": jnp.dtype(setting.dtype),
    }
    self._augment = functools.partial(augment.train_batch, **pixels)
    self._center = functools.partial(augment.test_batch, **pixels)

  def variables(self, weights: Params, task: int) -> Variables:
    """Returns the variables at the start of a task, behind tasks that learned noise."""
    variables = self.method.init(self._root, weights)
    for index in range(task):
      variables = self.begin(weights, variables, index)
      noise = optax.tree.random_like(jax.random.key(index), variables.cur)
      learned = optax.tree.add_scale(variables.cur, 0.01, noise)
      variables, _ = self.method.end_task(
        variables.replace(cur=learned), self._view(weights, index)
      )
    return self.begin(weights, variables, task)

  def begin(self, weights: Params, variables: Variables, task: int) -> Variables:
    return self.method.begin_task(variables, self._view(weights, task))[0]

  def _view(self, weights: Params, task: int) -> TaskView:
    """Returns a task of two images of noise, for methods that look at some."""
    side, (lo, _), count = self.setting.sizes.image_size, self.spec.class_ranges[task], 2
    noise = np.random.default_rng(task).integers(0, 256, (count, side, side, 3), np.uint8)
    examples = Examples(
      images=noise,
      sizes=np.full((count, 2), side, np.int32),
      labels=np.arange(lo, lo + count, dtype=np.int32),
      valid=np.ones(count, bool),
    )
    rows = np.arange(count, dtype=np.int32)
    return TaskView(
      index=task,
      num_classes=TASK_CLASSES,
      arrays=self._arrays(task),
      weights=weights,
      train_batches=lambda epoch: iter([(examples, rows)]),
      val_batches=lambda epoch: iter([(examples, rows)]),
      train_chunks=lambda first: iter([(examples, rows[None])]),
      augment=self._augment,
      center=self._center,
      fetch=mesh.fetch,
      key=lambda name: stream_key(self._root, name, task=task),
      seed=0,
    )

  def _arrays(self, task: int) -> TaskArrays:
    return TaskArrays(*map(jnp.int32, (task, *self.spec.class_ranges[task])))

  def stepper(self, task: int) -> Stepper:
    return Stepper(self.method, self.config, self.method.rules(task))

  def arguments(self, weights: Params, variables: Variables, task: int) -> tuple:
    """Returns (state, fixed, batch) of the first training step of a task."""
    fixed = Fixed(
      frozen=self.method.freeze(weights, variables),
      mem=variables.mem,
      task=self._arrays(task),
      total_steps=jnp.int32(10_000),
      root=self._root,
    )
    batch = Batch(
      images=self.images(),
      labels=self.spec.class_ranges[task][0] + jnp.arange(self.setting.batch) % TASK_CLASSES,
      valid=jnp.ones(self.setting.batch, bool),
    )
    # donated: shares nothing with what stays
    return jax.tree.map(jnp.copy, self.stepper(task).init(variables)), fixed, batch

  def images(self) -> jax.Array:
    side = self.setting.sizes.image_size
    shape = (self.setting.batch, side, side, 3)
    return jax.random.normal(jax.random.key(1), shape, jnp.dtype(self.setting.dtype))

  def training_step(self, weights: Params, task: int) -> Program:
    """Returns the training step of a run at a task, compiled."""
    arguments = self.arguments(weights, self.variables(weights, task), task)
    return Program(self.stepper(task).step, self.setting.batch, *arguments, donate=(0,))

  def shapes(self, weights: Params, task: int) -> tuple:
    """Returns `arguments` as shapes, for any method.

    `begin_task` is run for them, without the tasks before: it may do what has no shape before it is
    done, such as a decomposition on the host, and so decides what `cur` holds.
    """
    variables = self.begin(weights, self.method.init(self._root, weights), task)
    return jax.eval_shape(
      functools.partial(self.arguments, task=task), weights=weights, variables=variables
    )

  def num_trained(self, state: TrainState, task: int) -> int:
    """Returns how many parameters a step at a task changes."""
    trained, _ = partition(state.params, label_leaves(state.params, self.method.rules(task)))
    return sum(leaf.size for leaf in jax.tree.leaves(trained))

  def plain_forward(self, weights: Params) -> Program:
    """Returns the features of the frozen ViT without adapters, compiled."""
    params = frame.cast_kernels(weights, jnp.dtype(self.setting.dtype))
    return Program(self.backbone.apply, self.setting.batch, params, self.images())


def floor(setting: Setting) -> dict[str, float]:
  """Returns the FLOPs per image of the matrix products that cannot be left out.

  "forward": the plain ViT, of whose last block only the class token is wanted. "step": forward with
  prompt and adapters, then one product more for each frozen one and two for each of attention's,
  but in the first block's query, key and value only where a prompt waits for a gradient.
  """
  sizes, rank, prompts = setting.sizes, setting.rank, setting.prompts
  width, patches = sizes.width, sizes.grid**2
  embedding = 2 * patches * 3 * sizes.patch_size**2 * width

  def blocks(tokens):
    """FLOPs of (query, key, value; out and mlp; attention) over all blocks."""
    looking = [tokens] * (sizes.depth - 1) + [1]
    project = sum(2 * width**2 * (2 * tokens + n) for n in looking)
    rest = sum(2 * width**2 * (1 + 2 * sizes.mlp_ratio) * n for n in looking)
    return project, rest, sum(4 * width * tokens * n for n in looking)

  tokens = patches + 1 + prompts
  project, rest, attention = blocks(tokens)
  adapters = sum(
    2 * rank * (2 * width + rank) * n
    for n in (*[tokens] * sizes.depth, *[tokens] * (sizes.depth - 1), 1)
  )
  first = 2 * width**2 * 3 * tokens
  backward = project - first + first * prompts / tokens + rest + 2 * attention + adapters
  return {
    "forward": float(embedding + sum(blocks(patches + 1))),
    "step": float(embedding + project + rest + attention + adapters + backward),
  }


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
      "input": {"augmentation": "none", "steps_per_dispatch": 1},
      "bases": {"max_rank": max(ranks)},
    },
  )
  weights, sizes, _ = pretrained.load(config.weights)
  sequence = tasks.make(config.tasks, seed=config.seed, source_size=sizes.image_size)
  backbone = vit.make(sizes)

  def with_rank(rank):
    drs = dataclasses.replace(config.drs, strategy="fixed", rank=rank)
    return methods.make(dataclasses.replace(config, drs=drs), backbone, sequence.spec)

  method = with_rank(max(ranks))
  sizing = {"normalisation": "half", "image_size": sizes.image_size}
  trainer = Trainer(config, method, sequence, weights, mesh=mesh.make(), **sizing)
  variables = method.init(trainer.root, weights)
  for index, rank in enumerate(ranks):
    view = trainer.view(index)
    variables, _ = with_rank(rank).begin_task(variables, view)
    for state, _, _ in trainer.train(trainer.init(variables, index), variables, view):
      params = state.params
    variables, _ = method.end_task(variables.replace(**params), view)
  return trainer.num_programs()


def take_turns(
  runners: Mapping[str, Callable[[int], float]], repeats: int
) -> dict[str, list[float]]:
  """Returns the seconds a step took in each of `repeats` rounds; in a round each runner has a turn.

  Side by side, so that what else the machine does slows all of them alike.
  """
  steps = {}
  for name, run in runners.items():
    run(1)  # with what is done only once
    steps[name] = max(1, round(TURN_SECONDS / run(1)))
  seconds = {name: [] for name in runners}
  for _ in range(repeats):
    for name, run in runners.items():
      seconds[name].append(run(steps[name]) / steps[name])
  return seconds


def peak_flops(device_kind: str, dtype: str) -> float | None:
  """Returns the chip's peak in FLOP/s; None where it is unknown or the dtype is not bfloat16."""
  if dtype != "bfloat16":
    return None
  return next((peak for name, peak in PEAK_FLOPS if name in device_kind), None)


def measure(setting: Setting, repeats: int, peers_python: str | None = None) -> dict[str, Any]:
  """Returns what --json writes; peers_python: the interpreter for the peer, None leaves it out."""
  lab = Lab(setting)
  weights = jax.jit(lab.backbone.init)(jax.random.key(0))
  programs = {"forward": lab.plain_forward(weights)}
  programs |= {f"task_{task}": lab.training_step(weights, task - 1) for task in TASKS}
  if peers_python is None:
    seconds, peers = take_turns(programs, repeats), None
  else:
    sizes = dataclasses.asdict(setting.sizes) | {"num_classes": TASK_CLASSES}
    with Peer(dataclasses.asdict(setting) | sizes, peers_python) as peer:
      runners = {
        f"peer_{name}": functools.partial(peer.run, name) for name in peer.facts["variants"]
      }
      seconds, peers = take_turns(programs | runners, repeats), dict(peer.facts)
  peak = peak_flops(jax.devices()[0].device_kind, setting.dtype)
  least = floor(setting)
  result = _circumstances(setting) | {
    "floor_flops_per_image": least,
    "floor_ratio": least["step"] / least["forward"],
    "rank_of_10_tasks": list(RANKS),
    "programs_of_10_tasks": count_programs(),
  }
  base = programs["forward"].facts
  for name, program in programs.items():
    facts = _with_ratios(program.facts, base) | _speed(seconds[name], setting.batch)
    rate = facts["flops_per_image_as_written"] * facts["images_per_second"]
    result[name] = facts | {"mfu": None if peak is None else rate / peak}
  if peers is not None:
    ours = seconds[f"task_{TASKS[0]}"]
    for name in peers["variants"]:
      theirs = seconds[f"peer_{name}"]
      ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
      peers[name] = _speed(theirs, setting.batch) | {"ours_over_theirs": ratio}
    result["peers"] = peers
  return result


def count_methods(
  setting: Setting, choices: Sequence[Choice], note: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
  """Returns what XLA says of each method's compiled training step at TASKS; none is run.

  "left_out" says why of those whose settings can't be, at this size for instance; `note` is told
  which method's turn it is: some train a while before their first step.
  """
  backbone = vit.make(setting.sizes, jnp.dtype(setting.dtype))
  weights = jax.jit(backbone.init)(jax.random.key(0))
  base = Lab(setting).plain_forward(weights).facts
  counted, left_out = {}, {}
  for choice in choices:
    note(f"counting {choice}")
    try:
      counted[str(choice)] = _count_method(Lab(setting, choice), weights, base)
    except config_lib.ConfigError as error:
      left_out[str(choice)] = str(error)
  return _circumstances(setting) | {"forward": base, "methods": counted, "left_out": left_out}


def _count_method(lab: Lab, weights: Params, base: Mapping[str, Any]) -> dict[str, dict]:
  rows, programs = {}, {}
  for task in TASKS:
    shapes = lab.shapes(weights, task - 1)
    same = lab.method.rules(task - 1), str(shapes)  # then both tasks run one program
    if same not in programs:
      step = lab.stepper(task - 1).step
      programs[same] = Program(step, lab.setting.batch, *shapes, donate=(0,)).facts
    trained = {"trained": lab.num_trained(shapes[0], task - 1)}
    rows[f"task_{task}"] = _with_ratios(programs[same], base) | trained
  return rows


def _with_ratios(facts: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
  ratios = {
    kind.replace("flops_per_image", "ratio"): facts[kind] / base[kind]
    for kind in ("flops_per_image", "flops_per_image_as_written")
  }
  return dict(facts) | ratios


def _circumstances(setting: Setting) -> dict[str, Any]:
  kind = jax.devices()[0].device_kind
  return {
    "setting": dataclasses.asdict(setting),
    "device": f"{kind} ({jax.default_backend()}), {os.cpu_count()} CPU threads",
    "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
  }


def _speed(seconds: list[float], batch: int) -> dict[str, Any]:
  middle = statistics.median(seconds)
  return {"step_seconds": middle, "images_per_second": batch / middle, "all_step_seconds": seconds}


def table(result: Mapping[str, Any]) -> Table:
  """Returns the result for people."""
  shown = _empty_table(result, _caption(result), COLUMNS)
  rows = {"plain forward": "forward"} | {
    f"step at task {t} of {NUM_TASKS}": f"task_{t}" for t in TASKS
  }
  for label, name in rows.items():
    facts = result[name]
    shown.add_row(
      label,
      f"{facts['flops_per_image'] / 1e9:.2f}",
      f"{facts['ratio']:.3f}",
      f"{facts['compile_seconds']:.1f}",
      *_timing(facts),
      f"{facts['temp_bytes'] / 2**20:.0f}",
      "-" if facts["mfu"] is None else f"{facts['mfu']:.1%}",
    )
  least = result["floor_flops_per_image"]
  shown.add_row("least possible step", f"{least['step'] / 1e9:.2f}", f"{result['floor_ratio']:.3f}")
  peers = result.get("peers") or {"variants": []}
  for name in peers["variants"]:
    facts = peers[name]
    shown.add_row(
      f"HF + PEFT, {name}", "", "", "", *_timing(facts), "", "", f"{facts['ours_over_theirs']:.2f}"
    )
  return shown


def methods_table(result: Mapping[str, Any]) -> Table:
  """Returns what `count_methods` counted for people."""
  lines = [_where(result), "x: over the plain forward; as written: before XLA's passes"]
  lines += [f"left out: {label}: {reason}" for label, reason in result["left_out"].items()]
  shown = _empty_table(result, "\n".join(lines), METHOD_COLUMNS)
  shown.add_row("plain forward", "-", f"{result['forward']['flops_per_image'] / 1e9:.2f}")
  for label, rows in result["methods"].items():
    first, last = (rows[f"task_{task}"] for task in TASKS)
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


def _empty_table(result: Mapping[str, Any], caption: str, columns: Sequence[str]) -> Table:
  shown = Table(
    title=", ".join(f"{name} {value}" for name, value in result["setting"].items()),
    caption=caption,
    caption_justify="left",
    box=box.SIMPLE,
  )
  shown.add_column("", no_wrap=True)
  for name in columns:
    shown.add_column(name, justify="right", no_wrap=True)
  return shown


def _timing(facts) -> tuple[str, str]:
  return f"{facts['step_seconds'] * 1e3:.1f}", f"{facts['images_per_second']:.1f}"


def _caption(result: Mapping[str, Any]) -> str:
  first, last = (result[f"task_{task}"]["flops_per_image"] for task in TASKS)
  lines = [
    _where(result),
    f"FLOPs at task {TASKS[1]} over task {TASKS[0]}: {last / first:.4f}",
    f"{len(RANKS)} tasks of {len(set(RANKS[1:]))} ranks compile "
    f"{result['programs_of_10_tasks']} training steps, one of them task 1's",
  ]
  peers = result.get("peers")
  if peers:
    lines += [f"peer: {peers['device']}, {versions(peers['versions'])}"]
    lines += [f"peer: {line}" for line in peers["notes"]]
  return "\n".join(lines)


def _where(result: Mapping[str, Any]) -> str:
  return f"{result['device']}, {versions(result['versions'])}"


def versions(packages: Mapping[str, str]) -> str:
  return ", ".join(f"{name} {version}" for name, version in packages.items())


def main(argv: Sequence[str]) -> None:
  del argv
  values, console = flags.FLAGS, Console(width=None if sys.stdout.isatty() else 110)
  setting = Setting(**{f.name: getattr(values, f.name) for f in dataclasses.fields(Setting)})
  try:
    if values.methods:
      result = count_methods(setting, settings.parse_methods(values.methods), console.print)
      shown = methods_table(result)
    else:
      result = measure(setting, values.repeats, values.peers_python if values.peers else None)
      shown = table(result)
  except (ValueError, OSError) as error:
    sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
    sys.exit(2)
  console.print(shown)
  if values.json:
    pathlib.Path(values.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
  flags.DEFINE_string("architecture", Setting.architecture, "A name in models/vit.py.")
  flags.DEFINE_integer("batch", Setting.batch, "Images in a step.", lower_bound=1)
  flags.DEFINE_enum("dtype", Setting.dtype, ("float32", "bfloat16"), "What is computed in.")
  flags.DEFINE_integer("rank", Setting.rank, "Rank of the tasks from the second on.", lower_bound=1)
  flags.DEFINE_integer("prompts", Setting.prompts, "Prompt tokens.", lower_bound=0)
  flags.DEFINE_integer("repeats", 5, "Timed rounds; medians are shown.", lower_bound=1)
  flags.DEFINE_string("methods", None, "Count the FLOPs of these, as in fmlora_jax.compare.")
  flags.DEFINE_bool("peers", False, "Time PyTorch beside it; needs torch, transformers and peft.")
  flags.DEFINE_string("peers_python", sys.executable, "The Python that has them.")
  flags.DEFINE_string("json", None, "File for all numbers.")
  # beside PyTorch on one GPU: take memory as it is needed; read when JAX first uses the device
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  logging.set_verbosity(logging.WARNING)
  app.run(main)
