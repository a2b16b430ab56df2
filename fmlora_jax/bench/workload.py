"""Programs to measure: the training step of any method at any task, and its yardsticks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from fmlora_jax.cli import config_files, config_flag
from fmlora_jax.cli.methods_flag import Choice
from fmlora_jax.config import Config, ConfigError
from fmlora_jax.experiment import noise
from fmlora_jax.experiment.costs import Program
from fmlora_jax.experiment.noise import TASK_CLASSES
from fmlora_jax.methods.common import base
from fmlora_jax.models import products, vit
from fmlora_jax.train.step import StepContext, TrainState, TrainStep
from fmlora_jax.types import Batch, Params, Sizes, TaskView, Variables

FM_LORA = Choice("fm_lora")


def require_architecture(name: str) -> None:
  """Raises ConfigError if --architecture is not one of models/vit.py."""
  try:
    vit.architecture(name)
  except ValueError as error:
    raise ConfigError(f"--{error}") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchSettings:
  """Settings of a benchmark; the flags of the same names."""

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
      "tasks": {"benchmark": "random_images", "num_tasks": self.tasks},
      "bases": {"max_rank": max(32, self.rank)},
      "drs": {"strategy": "fixed", "rank": self.rank},
      "prompt": {"num_tokens": self.prompts},
    }
    return config_flag.change_config(config_files.defaults(**values), choice.changes)


class Workload:
  """A method at the start of any task of a run on noise. Tasks are counted from 0.

  Weights are arguments, so that a caller may trace the rest for shapes alone.
  """

  def __init__(self, setting: BenchSettings, choice: Choice = FM_LORA):
    self.setting = setting
    self.backbone = vit.make_vit(setting.sizes, jnp.dtype(setting.dtype))
    shapes = jax.eval_shape(self.backbone.init, jax.random.key(0))
    self.setup = noise.make_setup(setting.config(choice), setting.sizes, shapes)
    self.method = self.setup.method

  def weights(self) -> Params:
    """Returns a random backbone, float32."""
    return jax.jit(self.backbone.init)(jax.random.key(0))

  def variables(self, weights: Params, task: int) -> Variables:
    """Returns the variables at the start of a task, behind a first and a last that learned noise.

    Those between would fill slots of the memory with numbers and change no shape.
    """
    variables = self.method.init(self.setup.root, weights)
    for index in sorted({0, task - 1} if task else ()):
      variables = self.begin(weights, variables, index)
      noisy = optax.tree.random_like(jax.random.key(index), variables.cur)
      learned = variables.replace(cur=optax.tree.add_scale(variables.cur, 0.01, noisy))
      variables, _ = self.method.end_task(learned, self._view(weights, index))
    return self.begin(weights, variables, task)

  def begin(self, weights: Params, variables: Variables, task: int) -> Variables:
    """Returns the variables with which a task begins."""
    return self.method.begin_task(variables, self._view(weights, task))[0]

  def _view(self, weights: Params, task: int) -> TaskView:
    with jax.ensure_compile_time_eval():
      return dataclasses.replace(self.setup.views.view(task), weights=weights)

  def train_step(self, task: int) -> TrainStep:
    return self.setup.programs.train_step(self.method.rules(task))

  def arguments(
    self, weights: Params, variables: Variables, task: int
  ) -> tuple[TrainState, StepContext, Batch]:
    """Returns the arguments of the first training step of a task."""
    arrays = self._view(weights, task).arrays
    context = StepContext(
      frozen=self.method.freeze(weights, variables),
      mem=variables.mem,
      task=arrays,
      total_steps=jnp.int32(10_000),
      root=self.setup.root,
    )
    batch = Batch(
      images=self.images(),
      labels=arrays.lo + jnp.arange(self.setting.batch) % TASK_CLASSES,
      valid=jnp.ones(self.setting.batch, bool),
    )
    # a copy: the state is donated and must not share a buffer with the context
    state = jax.tree.map(jnp.copy, self.setup.trainer.init(variables, task))
    return state, context, batch

  def images(self) -> jax.Array:
    """Returns a batch of random images as the ViT sees them."""
    side = self.setting.sizes.image_size
    shape = (self.setting.batch, side, side, 3)
    return jax.random.normal(jax.random.key(1), shape, jnp.dtype(self.setting.dtype))

  def shapes(self, weights: Params, task: int) -> tuple[TrainState, StepContext, Batch]:
    """Returns the shapes of `arguments`, for any method.

    `begin_task` runs, without the tasks before: it may do what cannot be traced, such as a
    decomposition on the host, and decides what `cur` holds.
    """
    variables = self.begin(weights, self.method.init(self.setup.root, weights), task)
    return jax.eval_shape(functools.partial(self.arguments, task=task), weights, variables)

  def compile_step(self, arguments: tuple, task: int) -> Program:
    """Returns the training step of a task; arguments of `arguments` or `shapes`."""
    function = jax.jit(self.train_step(task).step, donate_argnums=0)
    return Program(function, *arguments, batch_size=self.setting.batch)

  def training_step(self, weights: Params, task: int) -> Program:
    """Returns the training step of a task with its arguments."""
    return self.compile_step(self.arguments(weights, self.variables(weights, task), task), task)

  def large_product(self) -> Program:
    """Returns the matrix product that shows the machine's rate: 4 widths by 4 widths, all tokens.

    A factor is an argument and comes back as the result, so that products follow products.
    """
    sizes, dtype = self.setting.sizes, jnp.dtype(self.setting.dtype)
    tokens = self.setting.batch * (sizes.num_tokens + self.setting.prompts)
    x = jnp.ones((tokens, 4 * sizes.width), dtype)
    w = jnp.eye(4 * sizes.width, dtype=dtype)
    function = jax.jit(lambda x, w: (products.multiply(x, w), ()))
    return Program(function, x, w, batch_size=self.setting.batch)

  def plain_forward(self, weights: Params) -> Program:
    """Returns the features of the frozen ViT without adapters."""
    params = base.cast_kernels(weights, jnp.dtype(self.setting.dtype))
    function = jax.jit(self.backbone.apply)
    return Program(function, params, self.images(), batch_size=self.setting.batch)
