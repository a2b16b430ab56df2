"""The measurement after each task: right answers on the test images of the tasks so far."""

import concurrent.futures

import jax
import numpy as np

from fmlora_jax.experiment.setup import RunSetup
from fmlora_jax.input.loader import Prefetcher
from fmlora_jax.train import mesh as mesh_lib
from fmlora_jax.train.evaluator import Evaluator, allowed_classes, iterate_batches
from fmlora_jax.types import Variables


class TestSets:
  """The images that fill the accuracy matrix, one set for each task.

  Args:
    setup: of the run.

  Attributes:
    sizes: images of each set.
  """

  __test__ = False  # for pytest

  def __init__(self, setup: RunSetup):
    self._setup, config = setup, setup.config
    records = [getattr(task, config.tasks.evaluate_on) for task in setup.sequence.tasks]
    self.sizes = np.asarray([len(indices) for indices in records])
    self._images = setup.loader.test_images(np.concatenate(records))
    self._evaluator = Evaluator(setup.method, setup.center)
    self._fold = jax.jit(setup.method.fold)

  def num_after(self, index: int) -> int:
    """Returns how many sets are measured after task `index`: in dil also the next task's."""
    spec = self._setup.sequence.spec
    return index + 1 + (spec.scenario == "dil" and index + 1 < spec.num_tasks)

  def prefetch(self, index: int, prefetcher: Prefetcher) -> concurrent.futures.Future | None:
    """Decodes the sets of task `index` in the background; None where images are streamed."""
    return self._images.prefetch(int(sum(self.sizes[: self.num_after(index)])), prefetcher)

  def count_correct(self, variables: Variables, index: int, num_sets: int) -> list[int]:
    """Returns right answers on the first sets, of a model that has learned tasks 0 to `index`."""
    setup = self._setup
    whole = mesh_lib.replicated(setup.mesh)
    model = self._fold(setup.weights, variables)
    masks = mesh_lib.place(allowed_classes(setup.sequence.spec, index), whole)
    batches = iterate_batches(
      self._images.read,
      self.sizes[:num_sets],
      setup.config.eval_batch_size,
      lambda owners: mesh_lib.place(owners, whole),
    )
    return self._evaluator.correct(model, batches, masks)[:num_sets].tolist()
