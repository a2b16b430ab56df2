"""What tests share: a ViT of two narrow blocks, made-up tasks, and methods that learned them."""

import contextlib
import dataclasses
import functools
import gc
import os
from collections.abc import Iterator
from unittest import mock

# before jax is imported; sub-processes inherit it
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
os.environ["HF_HUB_OFFLINE"] = "1"  # where huggingface_hub is installed, no test downloads
# programs are tiny: without optimisers they compile in half the time, and in half of that without
# the emitters of fusions that go through MLIR
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_max_isa=AVX",  # else these contract to FMA what other chunks of steps do not
  ]
)

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import type_checks

type_checks.install()
hypothesis.settings.register_profile("shared", deadline=None)  # other programs may run too
hypothesis.settings.load_profile("shared")

from fmlora_jax import methods
from fmlora_jax.cli import config_files
from fmlora_jax.experiment.setup import build_setup
from fmlora_jax.input import augment, resident
from fmlora_jax.models import vit
from fmlora_jax.models.weights import registry
from fmlora_jax.tasks.sequence import DataSource, Task, TaskSequence
from fmlora_jax.train import mesh
from fmlora_jax.train.rng import named_key
from fmlora_jax.train.step import TrainState
from fmlora_jax.types import Adapters, Batch, Sizes, TaskView, Variables
from fmlora_jax.workdir import checkpoint

SIZES = Sizes(image_size=16, patch_size=8, width=16, depth=2, num_heads=2)
RANGES = ((0, 2), (2, 5), (5, 7))  # unequal: the rows of a head are padded
PER_CLASS = {"train": 12, "val": 6, "test": 6}
SETTINGS = {  # what differs from config.Config's defaults
  "epochs": 2,
  "batch_size": 16,
  "eval_batch_size": 8,
  "compute_dtype": "float32",
  "input": {"augmentation": "mild", "steps_per_dispatch": 4},
  "optim": {"learning_rate": 0.02, "weight_decay": 0.5, "head_learning_rate": 1e-2},
  "bases": {"max_rank": 4},
  "drs": {"strategy": "fixed", "candidate_ranks": (1, 2, 4), "rank": 2},
  "prompt": {"num_tokens": 3},
}


def pytest_configure(config):
  """Keeps compiled programs from run to run, one folder per worker."""
  if hasattr(config, "cache"):
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    folder = str(config.cache.mkdir(f"xla-{worker}"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder  # of sub-processes
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


def pytest_addoption(parser):
  text = "pass the tests of this tier and those below: 1 at every commit, 2 at a merge, 3 by night"
  parser.addoption("--tier", type=int, choices=(1, 2, 3), default=1, help=text)


def pytest_collection_modifyitems(config, items):
  """Leaves out the tests of higher tiers."""
  tiers = [getattr(item.get_closest_marker("tier"), "args", (1,))[0] for item in items]
  left_out = [i for i, t in zip(items, tiers, strict=True) if t > config.getoption("tier")]
  config.hook.pytest_deselected(items=left_out)
  items[:] = sorted((item for item in items if item not in set(left_out)), key=_place(items))


def _place(items):
  """Returns the key by which tests are sorted: by case in files with `CASE_BY_CASE`."""
  files: dict = {}
  for item in items:
    files.setdefault(item.path, len(files))

  def key(item):
    is_sorted = getattr(item.module, "CASE_BY_CASE", False) and hasattr(item, "callspec")
    return files[item.path], item.callspec.id if is_sorted else ""

  return key


def pytest_collection_finish():
  """Keeps what was imported out of every later search for garbage; seldom looks for young one."""
  gc.collect()
  gc.freeze()
  gc.set_threshold(20_000)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
  """Gives each worker whole files, so that what a file compiles is compiled once."""
  from xdist.scheduler import LoadFileScheduling

  return LoadFileScheduling(config, log)


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_are_freed():
  """Drops the programs that a file compiled: no other file runs them, and they take gigabytes."""
  yield
  jax.clear_caches()
  gc.collect()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
  """A folder with small sets of all nine builders of TFDS that the paper's benchmarks read."""
  import fakes  # TFDS takes a second to import, which most tests do without

  root = tmp_path_factory.mktemp("tfds")
  for write in (fakes.imagenet_r, fakes.cifar100, fakes.caltech_birds2011, fakes.domainnet):
    write(root)
  return root


def made_up_sequence(
  scenario: str = "cil", ranges: tuple[tuple[int, int], ...] = RANGES, size: int = 16
) -> TaskSequence:
  """Returns tasks whose classes are noisy random patterns of 4 x 4 fields.

  Later tasks have one more training image per class than the one before; with equal ranges (dil)
  each task shows the patterns in other colours.
  """
  rng = np.random.default_rng(0)
  num_classes = max(hi for _, hi in ranges)
  patterns = rng.uniform(60, 196, (num_classes, 4, 4, 3))
  images, labels, tasks = [], [], []
  for index, (lo, hi) in enumerate(ranges):
    rows = {part: [] for part in PER_CLASS}
    for part, count in PER_CLASS.items():
      for label in [c for c in range(lo, hi) for _ in range(count + index * (part == "train"))]:
        pattern = np.roll(patterns[label], index if scenario == "dil" else 0, axis=-1)
        pixels = np.kron(pattern, np.ones((size // 4, size // 4, 1)))
        pixels = pixels + rng.normal(0, 20, pixels.shape)
        rows[part].append(len(images))
        images.append(np.clip(pixels, 0, 255).astype(np.uint8))
        labels.append(label)
    parts = {part: np.asarray(found) for part, found in rows.items()}
    tasks.append(Task(index=index, name=f"task {index}", lo=lo, hi=hi, **parts))
  images = np.stack(images)
  labels = np.asarray(labels, np.int32)
  source = DataSource(
    name="made_up",
    labels=labels,
    class_names=tuple(f"class {c}" for c in range(num_classes)),
    canvas=(size, size),
    decode=lambda rows: (images[rows], np.full((len(rows), 2), size, np.int32)),
    digest="0" * 64,
  )
  return TaskSequence(
    source=source,
    tasks=tuple(tasks),
    scenario=scenario,
    class_order=list(range(num_classes)),
    labels=labels,
    split_id="made_up",
    manifest_sha256="0" * 64,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
  """A task that was learned; the four `Variables` are those between the hooks of the method."""

  view: TaskView
  before: Variables  # as the task before left them
  begun: Variables
  trained: Variables
  ended: Variables
  state: TrainState  # at the end of training
  facts: dict
  losses: np.ndarray


class Lab:
  """A method on the tiny ViT, of `weights.depth` blocks if that is set, and the made-up tasks.

  Attributes:
    stages: what it learned so far.
  """

  def __init__(self, scenario: str = "cil", ranges: tuple = RANGES, **changes):
    self.config = methods.build_config(config_files.merged(SETTINGS, changes))
    self.sequence = made_up_sequence(scenario, ranges)
    self.spec = self.sequence.spec
    sizes = dataclasses.replace(SIZES, depth=self.config.weights.depth or SIZES.depth)
    self.backbone = _backbone(sizes, self.config.compute_dtype)
    self.weights = random_weights(sizes)
    self.method = methods.make_method(self.config, self.backbone, self.spec)
    self.setup = build_setup(
      self.config,
      self.method,
      self.sequence,
      self.weights,
      sizes=sizes,
      normalisation="half",
      mesh=mesh.make_mesh(),
      is_streaming=self.config.input.mode == "stream",
    )
    self.trainer, self.root = self.setup.trainer, self.setup.root
    self.stages: list[Stage] = []
    self.variables = self.method.init(named_key(self.root, "init", task=0), self.weights)

  def view(self, task: int) -> TaskView:
    return self.setup.views.view(task)

  def replicate(self, tree):
    return mesh.place(tree, mesh.replicated(self.setup.mesh))

  def learn(self, num: int | None = None) -> list[Stage]:
    """Learns until `num` tasks are learned, None means all; returns them all."""
    for index in range(len(self.stages), self.spec.num_tasks if num is None else num):
      view, before = self.view(index), self.variables
      begun, facts = self.method.begin_task(before, view)
      losses = []
      for state, stats, _ in self.trainer.train(self.trainer.init(begun, index), begun, view):
        losses.append(stats["loss"])
        last = state
      trained = begun.replace(**last.params)
      self.variables, more = self.method.end_task(trained, view)
      self.stages.append(
        Stage(
          view=view,
          before=before,
          begun=begun,
          trained=trained,
          ended=self.variables,
          state=last,
          facts=facts | more,
          losses=np.concatenate(losses),
        )
      )
    return self.stages

  def batch(self, count: int = 8, part: str = "train", task: int = 0) -> Batch:
    """Returns the first images of a split of a task as the ViT sees them at test time."""
    records = getattr(self.sequence.tasks[task], part)[:count]
    examples = resident.load_examples(self.sequence, records, count)
    return _center(self.replicate(examples), np.arange(count), **self.setup.center.keywords)

  def images(self, count: int = 8, part: str = "train", task: int = 0) -> jax.Array:
    return self.batch(count, part, task).images

  def features(self, images, adapters: Adapters | None = None) -> np.ndarray:
    """Returns the class tokens [B, D] of the untouched ViT, which may be handed adapters."""
    return np.asarray(jax.jit(self.backbone.apply)(self.weights, images, adapters))

  def training_logits(self, variables: Variables, stage: Stage, images, rows=None) -> jax.Array:
    """Returns the K logits of the unfolded model, as a training step computes them.

    Args:
      rows: of the head; None takes those in training.
    """
    cur = variables.cur if rows is None else variables.cur | {"head": rows}
    variables = variables.replace(frozen=self.method.freeze(self.weights, variables), cur=cur)
    return _apply(self.method)(variables, images, stage.view.arrays, stage.view.key("method"))

  def predictions(self, variables: Variables, images, *, jitted: bool = False) -> jax.Array:
    """Returns the logits [B, C] of the folded model.

    Args:
      jitted: folds in one program, as an evaluation does: sooner, and to rounding the same.
    """
    fold = _fold(self.method) if jitted else self.method.fold
    return _predict(self.method)(fold(self.weights, variables), images)


_center = jax.jit(
  augment.test_batch, static_argnames=("size", "augmentation", "normalisation", "dtype", "gather")
)


@functools.lru_cache(maxsize=8)
def _backbone(sizes: Sizes, dtype: str):
  return vit.make_vit(sizes, jnp.dtype(dtype))


@functools.lru_cache(maxsize=64)
def _apply(method):
  return jax.jit(lambda *arguments: method.apply(*arguments).logits)


@functools.lru_cache(maxsize=64)
def _fold(method):
  return jax.jit(method.fold)


@functools.lru_cache(maxsize=64)
def _predict(method):
  return jax.jit(method.predict)


@contextlib.contextmanager
def tiny_vit_loaded() -> Iterator[None]:
  """Runs within load the ViT of the labs, whatever their config names."""
  info = registry.WeightsInfo(tag="tiny", file=None, sha256="ab" * 32, normalisation="half")
  loaded = random_weights(), SIZES, info
  with mock.patch.object(registry, "load", lambda weights, image_size=None: loaded):
    yield


@pytest.fixture(scope="module")
def tiny_vit():
  """See `tiny_vit_loaded`."""
  with tiny_vit_loaded():
    yield


@functools.lru_cache(maxsize=2)
def random_weights(sizes: Sizes = SIZES):
  return jax.jit(vit.make_vit(sizes).init)(jax.random.key(0))


@pytest.fixture(scope="session")
def make_lab():
  """Returns Lab: (scenario, ranges, **changes of SETTINGS) -> a method that learned nothing yet."""
  return Lab


@pytest.fixture(scope="session")
def lab():
  """Returns a Lab of the named method that learned all tasks; made once for each setting."""
  made: dict[str, Lab] = {}

  def learned(name: str = "fm_lora", scenario: str = "cil", ranges: tuple = RANGES, **changes):
    changes = config_files.merged(changes, {"method": {"name": name}})
    key = repr((scenario, ranges, changes))
    if key not in made:
      made[key] = Lab(scenario, ranges, **changes)
      made[key].learn()
    return made[key]

  return learned


@pytest.fixture(scope="session")
def leaves():
  """Returns the function tree -> {path: NumPy array}."""
  return lambda tree: {path: np.asarray(leaf) for path, leaf in checkpoint.flatten(tree).items()}


@pytest.fixture(scope="session")
def changed(leaves):
  """Returns the function (tree, tree) -> the paths of leaves of which a bit differs."""

  def paths(before, after) -> set[str]:
    before, after = leaves(before), leaves(after)
    assert before.keys() == after.keys()
    return {path for path in before if before[path].tobytes() != after[path].tobytes()}

  return paths
