"""Runs on noise, for numbers that no image changes: FLOPs, memory, time, compiled programs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from fmlora_jax import methods
from fmlora_jax.config import Config
from fmlora_jax.experiment.setup import RunSetup, build_setup
from fmlora_jax.models import vit
from fmlora_jax.tasks.benchmarks import random_images
from fmlora_jax.tasks.sequence import make_sequence
from fmlora_jax.train import mesh as mesh_lib
from fmlora_jax.types import Params, Sizes

TASK_CLASSES = 10
PER_CLASS = 3  # images; one each for training, validation and test


def without_images(setup: RunSetup, most: int | None = None) -> RunSetup:
  """Returns the setup of the same tasks with one image of noise in place of all.

  Args:
    setup: of a run; no image of it is decoded.
    most: training images and validation images of a task; None means all.
  """
  sequence = setup.sequence
  pool = np.random.default_rng(0).integers(0, 256, (1, *sequence.source.canvas, 3), np.uint8)
  source = dataclasses.replace(
    sequence.source, decode=functools.partial(random_images.decode, pool)
  )
  tasks = tuple(
    dataclasses.replace(task, train=task.train[:most], val=task.val[:most])
    for task in sequence.tasks
  )
  return setup.with_sequence(dataclasses.replace(sequence, source=source, tasks=tasks))


def make_setup(config: Config, sizes: Sizes, weights: Params) -> RunSetup:
  """Returns the setup of a run on tasks of TASK_CLASSES new classes each, on one device.

  Args:
    config: of the run; `tasks.num_tasks` counts.
    sizes: of the ViT.
    weights: of the ViT, or their shapes where nothing is computed with them.
  """
  num_classes = TASK_CLASSES * config.tasks.num_tasks
  source = random_images.make_source(sizes.image_size, num_classes, PER_CLASS, pool=2)
  sequence = make_sequence(source, config.tasks, seed=config.seed)
  backbone = vit.make_vit(sizes, jnp.dtype(config.compute_dtype))
  device = np.asarray(jax.local_devices()[:1]).reshape(1, 1)
  return build_setup(
    config,
    methods.make_method(config, backbone, sequence.spec),
    sequence,
    weights,
    sizes=sizes,
    normalisation="half",
    mesh=jax.sharding.Mesh(device, mesh_lib.AXES),
  )
