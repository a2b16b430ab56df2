"""The setup of a run, built from its config; runs of one process share what they can."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fmlora_jax import methods, tasks
from fmlora_jax.config import Config
from fmlora_jax.distributed import hosts, memory
from fmlora_jax.experiment import preflight
from fmlora_jax.input import augment, resident
from fmlora_jax.input.loader import TaskLoader
from fmlora_jax.methods.common.base import AdaptedViT
from fmlora_jax.models import vit
from fmlora_jax.models.weights import registry
from fmlora_jax.tasks import TaskSequence
from fmlora_jax.train import mesh as mesh_lib
from fmlora_jax.train.loop import Trainer
from fmlora_jax.train.step import TrainPrograms
from fmlora_jax.train.view import TaskViews
from fmlora_jax.types import Params, Sizes

IMAGES_SHARE = 0.5  # of the memory, for images; the rest is the model's


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSetup:
  """All that a run is made of.

  Attributes:
    config: of the run.
    method: to train.
    sequence: the tasks.
    weights: the pre-trained backbone, float32, on the devices of the mesh.
    info: of the weights.
    sizes: of the ViT.
    normalisation: of pixels.
    mesh: devices.
    center: as of `TaskView`.
    loader: of images.
    programs: compiled training steps.
    root: PRNG key of the run.
    views: of tasks.
    trainer: of tasks.
  """

  config: Config
  method: AdaptedViT
  sequence: TaskSequence
  weights: Params
  info: registry.WeightsInfo
  sizes: Sizes
  normalisation: str
  mesh: jax.sharding.Mesh
  center: Callable
  loader: TaskLoader
  programs: TrainPrograms
  root: jax.Array = dataclasses.field(init=False)
  views: TaskViews = dataclasses.field(init=False)
  trainer: Trainer = dataclasses.field(init=False)

  def __post_init__(self):
    seed, whole = self.config.seed, mesh_lib.replicated(self.mesh)
    root = jax.jit(lambda: jax.random.key(seed), out_shardings=whole)()
    of_run = {"mesh": self.mesh, "root": root}
    pixels = {"augment": self.programs.augment, "center": self.center}
    trainer = Trainer(self.config, self.sequence, self.weights, self.programs, **of_run)
    views = TaskViews(self.config, self.loader, self.weights, **pixels, **of_run)
    for name, value in {"root": root, "views": views, "trainer": trainer}.items():
      object.__setattr__(self, name, value)  # the dataclass is frozen

  @property
  def caveats(self) -> list[str]:
    """Notes for a reader of the results, one line each."""
    return [*self.method.caveats, *self.sequence.caveats]

  def with_sequence(self, sequence: TaskSequence, seed: int | None = None) -> "RunSetup":
    """Returns the setup of a run on other tasks of the same spec, perhaps with another seed.

    Both share compiled programs.
    """
    config = self.config if seed is None else dataclasses.replace(self.config, seed=seed)
    loader = self.loader.with_sequence(sequence)
    return dataclasses.replace(self, config=config, sequence=sequence, loader=loader)


def build_setup(
  config: Config,
  method: AdaptedViT,
  sequence: TaskSequence,
  weights: Params,
  *,
  sizes: Sizes,
  normalisation: str,
  mesh: jax.sharding.Mesh,
  info: registry.WeightsInfo = registry.UNKNOWN,
  is_streaming: bool = False,
) -> RunSetup:
  """Returns the setup of a run; arguments as of `RunSetup`.

  Args:
    is_streaming: whether images are decoded when a batch needs them.
  """
  pixels = {
    "size": sizes.image_size,
    "augmentation": config.input.augmentation,
    "normalisation": normalisation,
    "dtype": jnp.dtype(config.compute_dtype),
    "gather": mesh_lib.make_gather_rows(mesh),
  }
  loader = TaskLoader(
    sequence,
    batch_size=mesh_lib.padded_size(config.batch_size, mesh),
    max_steps=config.input.steps_per_dispatch,
    shard=resident.ProcessShard(jax.process_index(), jax.process_count()),
    shard_batch=functools.partial(mesh_lib.shard_batch, mesh=mesh),
    is_streaming=is_streaming,
    workers=config.input.workers,
  )
  return RunSetup(
    config=config,
    method=method,
    sequence=sequence,
    weights=weights,
    info=info,
    sizes=sizes,
    normalisation=normalisation,
    mesh=mesh,
    center=functools.partial(augment.test_batch, **pixels),
    loader=loader,
    programs=TrainPrograms(method, config, functools.partial(augment.train_batch, **pixels), mesh),
  )


class SetupCache:
  """Builds the setups of runs and caches what several runs share.

  That is the weights on the devices, the source of the images and, where runs differ only in the
  seed, the method with its compiled programs.

  Args:
    keeps_images: whether decoded images stay on the host for the next run, if all fit.
  """

  def __init__(self, *, keeps_images: bool = False):
    self._keeps_images = keeps_images
    self._weights: dict[Any, tuple[Params, Sizes, registry.WeightsInfo]] = {}
    self._sources: dict[Any, tasks.DataSource] = {}
    self._setups: dict[Any, RunSetup] = {}

  def setup(self, config: Config, kind: Callable = contextlib.nullcontext) -> RunSetup:
    """Returns the setup of a run of `config`.

    Args:
      kind: "weights" or "data" -> a context in which they are loaded.

    Raises:
      ConfigError: if a setting or a file is invalid.
    """
    preflight.check(config, memory.host_memory())
    preflight.check_files(config)
    mesh = mesh_lib.make_mesh(config.mesh.fsdp)
    with kind("weights"):
      weights, sizes, info = self._load_weights(config, mesh)
    with kind("data"):
      sequence, mode = self._load_tasks(config, config.input.source_size or sizes.image_size)
    normalisation = config.input.normalisation or info.normalisation
    augment.check(config.input.augmentation, normalisation)
    assert normalisation is not None
    key = dataclasses.replace(config, seed=Config.seed), sequence.spec, mode
    if key in self._setups:
      setup = self._setups[key].with_sequence(sequence, config.seed)
    else:
      backbone = vit.make_vit(sizes, jnp.dtype(config.compute_dtype))
      setup = build_setup(
        config,
        methods.make_method(config, backbone, sequence.spec),
        sequence,
        weights,
        sizes=sizes,
        normalisation=normalisation,
        mesh=mesh,
        info=info,
        is_streaming=mode == "stream",
      )
    self._setups[key] = setup
    return setup

  def _load_weights(
    self, config: Config, mesh: jax.sharding.Mesh
  ) -> tuple[Params, Sizes, registry.WeightsInfo]:
    """Returns the weights, on the devices, and the facts of `registry.load`."""
    key = config.weights, config.input.image_size, config.mesh
    if key not in self._weights:
      weights, sizes, info = registry.load(config.weights, config.input.image_size)
      weights = mesh_lib.place(weights, mesh_lib.fsdp_sharding(mesh, weights))
      self._weights[key] = weights, sizes, info
    return self._weights[key]

  def _load_tasks(self, config: Config, source_size: int) -> tuple[TaskSequence, str]:
    """Returns the tasks, and whether their images are "resident" or come as a "stream"."""
    key, host = (config.tasks, source_size), int(IMAGES_SHARE * memory.host_memory())
    source = self._sources.get(key)
    sequence = tasks.make(config.tasks, seed=config.seed, source_size=source_size, source=source)
    device = memory.device_memory()
    if device is not None:
      device = int(IMAGES_SHARE * device * jax.device_count())
    mode = hosts.run_on_first(
      functools.partial(
        resident.choose_mode,
        sequence,
        config.tasks.evaluate_on,
        config.input.mode,
        device=device,
        host=host,
      )
    )
    count = len(sequence.labels)
    if self._keeps_images and mode == "resident" and resident.num_bytes(sequence, count) <= host:
      sequence = resident.cache_decoded(sequence, range(count))
    self._sources[key] = sequence.source
    return sequence, mode
