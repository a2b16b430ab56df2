"""Training of one task: a loop over chunks of steps, resumable at any of them."""

import contextlib
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from fmlora_jax.config import Config, ConfigError
from fmlora_jax.input import order
from fmlora_jax.methods.common.base import BATCH_VOTE
from fmlora_jax.tasks import TaskSequence
from fmlora_jax.train import mesh as mesh_lib
from fmlora_jax.train.step import StepContext, TrainPrograms, TrainState
from fmlora_jax.types import NonFiniteError, Params, TaskView, Variables

Stats = dict[str, np.ndarray]  # "loss" and "grad_norm" of some steps


class Trainer:
  """Trains a method on one task after another.

  Args:
    config: of the run.
    sequence: the tasks.
    weights: the pre-trained backbone, float32, on the devices of the mesh.
    programs: of the method.
    mesh: devices; `mesh.py` says which array lies where.
    root: PRNG key of the run.

  Raises:
    ConfigError: if a batch that votes does not divide over the devices, or a task has more steps
      than can be counted.
  """

  def __init__(
    self,
    config: Config,
    sequence: TaskSequence,
    weights: Params,
    programs: TrainPrograms,
    *,
    mesh: jax.sharding.Mesh,
    root: jax.Array,
  ):
    if BATCH_VOTE in programs.method.caveats:
      mesh_lib.check_vote(config.batch_size, "batch_size", mesh)
      mesh_lib.check_vote(config.eval_batch_size, "eval_batch_size", mesh)
    self.config, self.sequence, self.weights, self.programs = config, sequence, weights, programs
    self._mesh, self._root = mesh, root
    most = max(self.num_steps(index) for index in range(len(sequence.tasks)))
    if most >= 2**31:
      raise ConfigError(
        f"config.epochs is {config.epochs}: must be less, a task would have {most} steps, and they "
        "are counted to 2147483647"
      )

  def steps_per_epoch(self, index: int) -> int:
    """Returns the steps of one epoch of task `index`; the last batch may be padded."""
    return -(-len(self.sequence.tasks[index].train) // self.config.batch_size)

  def num_steps(self, index: int) -> int:
    """Returns the steps of task `index`."""
    return self.config.epochs * self.steps_per_epoch(index)

  def steps_before(self, index: int) -> int:
    """Returns the steps of all tasks before `index`."""
    return sum(map(self.num_steps, range(index)))

  def init(self, variables: Variables, index: int) -> TrainState:
    """Returns the state at the start of task `index`."""
    return self.programs.train_step(self.programs.method.rules(index)).init(variables)

  def step_context(self, variables: Variables, view: TaskView) -> StepContext:
    """Returns the inputs that the steps of a task share, on the devices."""
    frozen = self.programs.method.freeze(self.weights, variables)
    return StepContext(
      frozen=mesh_lib.place(frozen, mesh_lib.fsdp_sharding(self._mesh, frozen)),
      mem=self._replicate(variables.mem_of_steps),
      task=view.arrays,
      total_steps=self._replicate(jnp.int32(self.num_steps(view.index))),
      root=self._root,
    )

  def train(
    self, state: TrainState, variables: Variables, view: TaskView
  ) -> Iterator[tuple[TrainState, Stats, float]]:
    """Yields (state, stats, seconds) after each chunk of steps until the task is done.

    `stats` are numbers of the chunk's steps; `seconds` include the wait for its images. A chunk
    ends at every multiple of `checkpoint.every_steps`, so that the state may be saved there. The
    yielded state is donated to the next chunk.

    Raises:
      NonFiniteError: if a loss, a gradient norm or a parameter is not finite, with task and step;
        no state after that step is ever yielded.
      ConfigError: if images are streamed and one can't be decoded any more.
      Stopped: between two chunks, if the program is to stop.
    """
    multi_step = self.programs.multi_step(self.programs.method.rules(view.index))
    context = self.step_context(variables, view)
    # a copy: the program donates it, and a method may have put one array in two leaves
    state = jax.tree.map(jnp.copy, self._replicate(state))
    done = int(state.step)
    with contextlib.closing(view.train_chunks(done)) as chunks:
      began = time.monotonic()
      for examples, rows in chunks:
        num = int(np.sum(rows[:, 0] >= 0))
        rows, count = self._replicate((rows, np.int32(num)))
        state, stats = multi_step(state, context, examples, rows, count)
        stats = {name: np.asarray(values)[:num] for name, values in stats.items()}
        if (good := int(state.step) - done) < num:
          stats = {name: values[: good + 1] for name, values in stats.items()}
          raise self._non_finite(stats, view.index, done + good)
        done += num
        yield state, stats, time.monotonic() - began
        began = time.monotonic()

  def _replicate(self, tree):
    return mesh_lib.place(tree, mesh_lib.replicated(self._mesh))

  def _non_finite(self, stats: Stats, task: int, step: int) -> NonFiniteError:
    """Returns the error of the step after `step` others; the last of `stats` are its numbers."""
    last = {name: values[-1] for name, values in stats.items()}
    what = f"loss is {last['loss']} and gradient norm {last['grad_norm']}"
    if np.isfinite([*last.values()]).all():
      what = f"a trained parameter is not finite ({what})"
    epoch, batch = divmod(step, self.steps_per_epoch(task))
    images, config = self.sequence.tasks[task].train, self.config
    rows = order.epoch_indices(len(images), config.batch_size, config.seed, task, epoch)[batch]
    return NonFiniteError(
      f"{what} at task {task + 1} of {len(self.sequence.tasks)}, step {step + 1}: must be finite; "
      "lower config.optim.learning_rate or set config.optim.clip_norm",
      {
        "task": task + 1,
        "step": step + 1,
        "last_steps": {name: [f"{v:.6g}" for v in values] for name, values in stats.items()},
        "images": [self.sequence.source.shown(row) for row in images[rows[rows >= 0]]],
      },
    )
