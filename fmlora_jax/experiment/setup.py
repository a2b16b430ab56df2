"""What a run is made of; runs of one process share what their seeds do not decide."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fmlora_jax import methods, tasks
from fmlora_jax.config import Config
from fmlora_jax.distributed import hosts, memory
from fmlora_jax.experiment import preflight
from fmlora_jax.input import augment, resident
from fmlora_jax.models import vit
from fmlora_jax.models.weights import registry
from fmlora_jax.tasks import TaskSequence
from fmlora_jax.train import mesh as mesh_lib
from fmlora_jax.train.loop import Trainer
from fmlora_jax.types import Params, Sizes

IMAGES_SHARE = 0.5  # of the memory, for images; the rest is the model's


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSetup:
  """What a run is made of.

  Attributes:
    trainer: holds the method, the task sequence and the weights.
    sizes: of the ViT.
    info: which weights they are.
    normalisation: of pixels.
  """

  trainer: Trainer
  sizes: Sizes
  info: registry.WeightsInfo
  normalisation: str


class SetupCache:
  """Makes the parts of runs, and what several of them have in common only once.

  That is the weights on the devices, the source of the images and, where runs differ in the seed
  only, the method with all that is compiled for it.

  Args:
    keeps_images: whether what was decoded for a run stays on the host for the next, if all fits.
  """

  def __init__(self, *, keeps_images: bool = False):
    self._keeps_images = keeps_images
    self._weights: dict[Any, tuple[Params, Sizes, registry.WeightsInfo]] = {}
    self._sources: dict[Any, tasks.Source] = {}
    self._trainers: dict[Any, Trainer] = {}

  def parts(self, config: Config, kind: Callable = contextlib.nullcontext) -> RunSetup:
    """Returns what a run of `config` needs.

    Args:
      kind: of "weights" or "data" -> a context in which they are looked up.

    Raises:
      ConfigError: if a setting or a file can't be used.
    """
    preflight.check(config, memory.host_memory())
    mesh = mesh_lib.make_mesh(config.mesh.fsdp)
    with kind("weights"):
      weights, sizes, info = self._load(config, mesh)
    with kind("data"):
      sequence, mode = self._arrange(config, config.input.source_size or sizes.image_size)
    normalisation = config.input.normalisation or info.normalisation
    augment.check(config.input.augmentation, normalisation)
    alike = dataclasses.replace(config, seed=Config.seed), sequence.spec, mode
    if alike in self._trainers:
      trainer = self._trainers[alike].reseeded(config.seed, sequence)
    else:
      backbone = vit.make_vit(sizes, jnp.dtype(config.compute_dtype))
      trainer = Trainer(
        config,
        methods.make_method(config, backbone, sequence.spec),
        sequence,
        weights,
        normalisation=normalisation,
        image_size=sizes.image_size,
        mesh=mesh,
        streams=mode == "stream",
      )
    self._trainers[alike] = trainer
    return RunSetup(trainer=trainer, sizes=sizes, info=info, normalisation=normalisation)

  def _load(
    self, config: Config, mesh: jax.sharding.Mesh
  ) -> tuple[Params, Sizes, registry.WeightsInfo]:
    """Returns the weights, which are on the devices, and what `pretrained.load` says of them."""
    wanted = config.weights, config.input.image_size, config.mesh
    if wanted not in self._weights:
      weights, *facts = registry.load(config.weights, config.input.image_size)
      weights = mesh_lib.place(weights, mesh_lib.fsdp_sharding(mesh, weights))
      self._weights[wanted] = weights, *facts
    return self._weights[wanted]

  def _arrange(self, config: Config, source_size: int) -> tuple[TaskSequence, str]:
    """Returns the tasks, and whether their images are "resident" or come as a "stream"."""
    wanted, host = (config.tasks, source_size), int(IMAGES_SHARE * memory.host_memory())
    sequence = tasks.make(
      config.tasks,
      seed=config.seed,
      source_size=source_size,
      source=self._sources.get(wanted),
    )
    own = memory.device_memory()
    device = None if own is None else int(IMAGES_SHARE * own * jax.device_count())
    mode = hosts.run_on_first(
      lambda: resident.choose_mode(
        sequence, config.tasks.evaluate_on, config.input.mode, device=device, host=host
      )
    )
    count = len(sequence.labels)
    if self._keeps_images and mode == "resident" and resident.num_bytes(sequence, count) <= host:
      sequence = resident.cache_decoded(sequence, range(count))
    self._sources[wanted] = sequence.source
    return sequence, mode
