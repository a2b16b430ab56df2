"""A training step of any method at any task of a sequence, on a random ViT and random images."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fmlora_jax import methods
from fmlora_jax.cli import config_files, config_flag
from fmlora_jax.cli.methods_flag import Choice
from fmlora_jax.config import Config
from fmlora_jax.input import augment
from fmlora_jax.methods.common import base
from fmlora_jax.models import products, vit
from fmlora_jax.train import mesh
from fmlora_jax.train.labels import num_trained
from fmlora_jax.train.rng import named_key
from fmlora_jax.train.step import StepContext, TrainState, TrainStep
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

TASK_CLASSES = 10
FM_LORA = Choice("fm_lora")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchSettings:
  """What is measured; the flags of the same names."""

  architecture: str = "vit_b16"
  batch: int = 8
  dtype: str = "float32"
  rank: int = 16
  prompts: int = 10
  tasks: int = 20

  @property
  def sizes(self) -> Sizes:
    return vit.architecture(self.architecture)

  @property
  def measured(self) -> tuple[int, int]:
    """The tasks whose step is measured, from 1: the first that trains cores alone, and the last."""
    return 2, self.tasks

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
    return config_flag.change_config(config_files.defaults(**values), choice.changes)


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
      "flops_per_image": (self._run.cost_analysis() or {})["flops"] / batch,
      "flops_per_image_as_written": (lowered.cost_analysis() or {})["flops"] / batch,
      "compile_seconds": time.monotonic() - began,
      "temp_bytes": cast(Any, self._run.memory_analysis()).temp_size_in_bytes,
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


class Workload:
  """A method on tasks of 10 new classes, at the start of any of them.

  Tasks are counted from 0 here.
  """

  def __init__(self, setting: BenchSettings, choice: Choice = FM_LORA):
    self.setting, self.config = setting, setting.config(choice)
    starts = range(0, setting.tasks * TASK_CLASSES, TASK_CLASSES)
    self.spec = SequenceSpec(
      scenario="cil",
      num_tasks=setting.tasks,
      num_classes=setting.tasks * TASK_CLASSES,
      class_ranges=tuple((lo, lo + TASK_CLASSES) for lo in starts),
    )
    self.backbone = vit.make_vit(setting.sizes, jnp.dtype(setting.dtype))
    self.method = methods.make_method(self.config, self.backbone, self.spec)
    self._root = jax.random.key(0)
    pixels = {
      "size": setting.sizes.image_size,
      "augmentation": self.config.input.augmentation,
      "normalisation": "half",
      "dtype": jnp.dtype(setting.dtype),
    }
    self._augment = functools.partial(augment.train_batch, **pixels)
    self._center = functools.partial(augment.test_batch, **pixels)

  def weights(self) -> Params:
    """Returns a random backbone, float32."""
    return jax.jit(self.backbone.init)(jax.random.key(0))

  def variables(self, weights: Params, task: int) -> Variables:
    """Returns the variables at the start of a task, behind a first and a last that learned noise.

    Those between would fill slots of the memory with numbers and change no shape.
    """
    variables = self.method.init(self._root, weights)
    for index in sorted({0, task - 1} if task else ()):
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
      train_batches=lambda epoch: (item for item in [(examples, rows)]),
      val_batches=lambda epoch: (item for item in [(examples, rows)]),
      train_chunks=lambda first: (item for item in [(examples, rows[None])]),
      augment=self._augment,
      center=self._center,
      gather=mesh.gather_to_host,
      replicate=lambda tree: tree,  # one process
      key=lambda name: named_key(self._root, name, task=task),
      seed=0,
    )

  def _arrays(self, task: int) -> TaskArrays:
    return TaskArrays(*map(jnp.int32, (task, *self.spec.class_ranges[task])))

  def stepper(self, task: int) -> TrainStep:
    return TrainStep(self.method, self.config, self.method.rules(task))

  def arguments(self, weights: Params, variables: Variables, task: int) -> tuple:
    """Returns (state, fixed, batch) of the first training step of a task."""
    fixed = StepContext(
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
    return num_trained(state.params, self.method.rules(task))

  def large_product(self) -> Program:
    """Returns the matrix product that shows the machine's rate: 4 widths by 4 widths, all tokens.

    Its factors are arguments and one of them is what comes back, so that products follow products.
    """
    sizes, dtype = self.setting.sizes, jnp.dtype(self.setting.dtype)
    tokens = self.setting.batch * (sizes.num_tokens + self.setting.prompts)
    x = jnp.ones((tokens, 4 * sizes.width), dtype)
    w = jnp.eye(4 * sizes.width, dtype=dtype)
    return Program(lambda x, w: (products.multiply(x, w), ()), self.setting.batch, x, w)

  def plain_forward(self, weights: Params) -> Program:
    """Returns the features of the frozen ViT without adapters, compiled."""
    params = base.cast_kernels(weights, jnp.dtype(self.setting.dtype))
    return Program(self.backbone.apply, self.setting.batch, params, self.images())
