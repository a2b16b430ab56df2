"""Task sequences: a data source in splits (train, val, test) and tasks over one label space."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Collection, Sequence

import numpy as np
from jaxtyping import Bool, Int, Int8, UInt8

from fmlora_jax.config import ConfigError, TasksConfig
from fmlora_jax.types import SequenceSpec

TRAIN, VAL, TEST = 0, 1, 2
NAMED = 3  # classes of a task whose names are its name
SPLIT_CODES = {"train": TRAIN, "val": VAL, "test": TEST}

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSource:
  """Labelled images, before they are divided into tasks.

  Attributes:
    name: of the benchmark.
    labels: canonical class of each record.
    class_names: by canonical class.
    canvas: (height, width) in pixels that every decoded image fits into.
    decode: record indices [k] -> pixels [k, h, w, 3] in the upper left corner of a zero canvas, and
      (height, width) [k, 2] of each. It can be pickled, for processes that decode, and its
      ConfigError names the record that can't be decoded.
    digest: sha256 hex of the data (labels, names, contents), without their splits.
    split: published split of each record: TRAIN, VAL, TEST, or -1 for none; None if none has one.
    split_name: name of a `split` that is complete: nothing is drawn, even if it has no VAL.
    val_splits: names that config.tasks.split may have for a complete split with VAL.
    domains: domain of each record; None without domains.
    domain_names: by domain.
    group: of each record; a split that is drawn never divides a group. Copies of one image are a
      group. None: each record is its own group, and copies are unknown.
    shown: record -> name of the record for people.
    caveats: notes for a reader of results on these data, one line each.
  """

  name: str
  labels: Int[np.ndarray, " n"]
  class_names: tuple[str, ...]
  canvas: tuple[int, int]
  decode: Callable[[np.ndarray], tuple[UInt8[np.ndarray, "k h w 3"], Int[np.ndarray, "k 2"]]]
  digest: str
  split: Int8[np.ndarray, " n"] | None = None
  split_name: str | None = None
  val_splits: tuple[str, ...] = ()
  domains: Int[np.ndarray, " n"] | None = None
  domain_names: tuple[str, ...] = ()
  group: Int[np.ndarray, " n"] | None = None
  shown: Callable[[int], str] = "record {}".format
  caveats: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """One task: ascending record indices (int64) of its splits, and its label positions lo..hi-1.

  Attributes:
    index: from 0.
    name: of its domain, or of its classes as `task_name` has them.
  """

  index: int
  name: str
  train: Int[np.ndarray, " n_train"]
  val: Int[np.ndarray, " n_val"]
  test: Int[np.ndarray, " n_test"]
  lo: int
  hi: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSequence:
  """Tasks in the order in which they are learned.

  Attributes:
    class_order: position p holds the canonical class class_order[p].
    labels: position of each record's class.
    split_id: name of the division into train, val and test.
    manifest_sha256: of the records and their splits; not of the order of classes or tasks.
  """

  source: DataSource
  tasks: tuple[Task, ...]
  scenario: str
  class_order: list[int]
  labels: Int[np.ndarray, " n"]
  split_id: str
  manifest_sha256: str

  @property
  def num_classes(self) -> int:
    return len(self.class_order)

  @property
  def class_names(self) -> tuple[str, ...]:
    """Class names by position."""
    return tuple(self.source.class_names[c] for c in self.class_order)

  @property
  def spec(self) -> SequenceSpec:
    return SequenceSpec(
      scenario=self.scenario,
      num_tasks=len(self.tasks),
      num_classes=self.num_classes,
      class_ranges=tuple((task.lo, task.hi) for task in self.tasks),
      has_val=all(len(task.val) for task in self.tasks),
      val_splits=self.source.val_splits,
    )

  @property
  def caveats(self) -> tuple[str, ...]:
    """Notes for a reader of results on these tasks, one line each."""
    of_tasks = (_one_class(self.spec), _drawn_test(self))
    return (*(text for text in of_tasks if text), *self.source.caveats)


def task_name(class_names: Sequence[str]) -> str:
  """Returns the name of a task of new classes: "cat, dog", or "ant ... zebra (20 classes)"."""
  if len(class_names) <= NAMED:
    return ", ".join(class_names)
  return f"{class_names[0]} ... {class_names[-1]} ({len(class_names)} classes)"


def _one_class(spec: SequenceSpec) -> str | None:
  """Returns what it means that tasks have one class; None if none has."""
  alone = sum(hi - lo == 1 for lo, hi in spec.class_ranges)
  if not alone:
    return None
  advice = "add classes"
  if spec.num_classes > 1 and not spec.shares_classes:
    fewer = max(n for n in range(1, spec.num_classes) if spec.num_classes % n == 0)
    advice = f"set config.tasks.num_tasks to {fewer} or less, for two classes a task or more"
  return (
    f"{alone} of {spec.num_tasks} tasks have one class, in which cross-entropy is 0: their steps "
    "learn nothing from images, and a method ends as linear_probe with the same head does; "
    f"{advice} (config.head.alignment.epochs > 0 trains the head, and the head alone)"
  )


def _drawn_test(sequence: TaskSequence) -> str | None:
  """Returns that test images are training images beside a validation split; None if not so."""
  split = sequence.source.split
  tests = np.concatenate([task.test for task in sequence.tasks])
  if split is None or not np.any(split == VAL) or not np.any(split[tests] < VAL):
    return None
  return (
    "the data have training and validation images alone, and the test images were drawn from "
    "those for training; to test on the validation images, as is usual for ImageNet, set "
    "config.tasks.test_from to val"
  )


def make_order(count: int, order: str, seed: int) -> list[int]:
  """Returns 0..count-1, "natural" or "shuffled" by NumPy's frozen legacy generator, as SD-LoRA."""
  if order == "natural":
    return list(range(count))
  return np.random.RandomState(seed).permutation(count).tolist()


def make_sequence(source: DataSource, config: TasksConfig, *, seed: int) -> TaskSequence:
  """Returns the sequence that `config` asks for; `seed` orders it where order_seed is None.

  Raises:
    ConfigError: if the source has no such tasks, or a class of a task no train or no test image.
  """
  order_seed = seed if config.order_seed is None else config.order_seed
  codes = make_split(source, config)
  make_tasks = _domain_tasks if config.scenario == "dil" else _class_tasks
  class_order, members = make_tasks(source, config, order_seed)
  labels = np.argsort(class_order)[source.labels].astype(np.int32)
  tasks = tuple(
    Task(
      index=index,
      name=name,
      lo=lo,
      hi=hi,
      **{split: np.flatnonzero((codes == code) & mask) for split, code in SPLIT_CODES.items()},
    )
    for index, (name, lo, hi, mask) in enumerate(members(labels))
  )
  sequence = TaskSequence(
    source=source,
    tasks=tasks,
    scenario=config.scenario,
    class_order=class_order,
    labels=labels,
    split_id=make_split_id(source, config),
    manifest_sha256=make_manifest(source, codes),
  )
  refuse_empty_classes(sequence)
  return sequence


def _class_tasks(source, config, seed):
  """Returns the class order and a function: labels -> (name, lo, hi, mask) of each cil task."""
  count = len(source.class_names)
  check_divides(config.num_tasks, count, source.name)
  size = count // config.num_tasks

  order = make_order(count, config.order, seed)

  def members(labels):
    for lo in range(0, count, size):
      name = task_name([source.class_names[c] for c in order[lo : lo + size]])
      yield name, lo, lo + size, (labels >= lo) & (labels < lo + size)

  return order, members


def check_divides(num_tasks: int, num_classes: int, name: str) -> None:
  """Raises ConfigError unless tasks of new classes can all have the same number of them."""
  if num_classes % num_tasks:
    divisors = ", ".join(str(d) for d in range(1, num_classes + 1) if num_classes % d == 0)
    raise ConfigError(
      f"config.tasks.num_tasks is {num_tasks}: must divide the {num_classes} classes of {name}, "
      f"so be one of {divisors}"
    )


def _domain_tasks(source, config, seed):
  """Returns the natural class order and a function as `_class_tasks`, for dil."""
  if source.domains is None:
    raise ConfigError(
      f"config.tasks.scenario is 'dil': {source.name} has no domains; "
      "set cil or til, or a benchmark that has domains"
    )
  count = len(source.domain_names)
  if config.num_tasks > count:
    raise ConfigError(
      f"config.tasks.num_tasks is {config.num_tasks}: must be at most {count}, the number of "
      f"domains of {source.name} ({', '.join(source.domain_names)})"
    )
  num_classes = len(source.class_names)

  def members(labels):
    del labels  # all classes are in each domain
    for domain in make_order(count, config.order, seed)[: config.num_tasks]:
      yield source.domain_names[domain], 0, num_classes, source.domains == domain

  return list(range(num_classes)), members


def check_test_from(config: TasksConfig, published: Collection[int]) -> None:
  """Raises ConfigError if the validation images can't be the test images, as config.test_from says.

  Args:
    published: splits that the data have, of TRAIN, VAL and TEST.
  """
  if config.test_from == "val" and (TEST in published or VAL not in published):
    has = "test images of its own" if TEST in published else "no validation images of its own"
    raise ConfigError(
      f"config.tasks.test_from is 'val': must be 'train', {config.benchmark} has {has}"
    )


def _published(source: DataSource, config: TasksConfig) -> Int8[np.ndarray, " n"] | None:
  """Returns `source.split`, with validation images as test images if config.test_from says so."""
  check_test_from(config, [] if source.split is None else np.unique(source.split).tolist())
  if config.test_from == "train" or source.split is None:
    return source.split
  return np.where(source.split == VAL, TEST, source.split).astype(np.int8)


def make_split(source: DataSource, config: TasksConfig) -> Int8[np.ndarray, " n"]:
  """Returns TRAIN, VAL or TEST of each record.

  Published splits are taken. A missing one is drawn from the training images, per class and domain:
  first test, then val. The draw of a class depends on split_seed and on that class alone.
  """
  published = _published(source, config)
  if source.split_name is not None and published is not None:
    return published
  codes = np.full(len(source.labels), TRAIN, np.int8)
  if published is not None:
    codes = np.maximum(published, TRAIN)
  draws_val = config.val_fraction > 0 and not np.any(codes == VAL)
  if not np.any(codes == TEST):
    draw = Draw(fraction=config.test_fraction, leave=1 + draws_val, seed=(config.split_seed, TEST))
    codes[_draw(source, codes == TRAIN, draw)] = TEST
  if draws_val:
    draw = Draw(fraction=config.val_fraction, leave=1, seed=(config.split_seed, VAL))
    codes[_draw(source, codes == TRAIN, draw)] = VAL
  return codes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draw:
  """A draw: the share of each class and domain, and the records to leave at least."""

  fraction: float
  leave: int
  seed: tuple[int, int]


def _draw(
  source: DataSource, allowed: Bool[np.ndarray, " n"], draw: Draw
) -> Bool[np.ndarray, " n"]:
  """Returns a mask of the records drawn from the allowed ones: one of each class at the least.

  Groups are drawn whole, counted once, in the class and domain of their first record. Of a class
  with one record, none is drawn; with too few to leave `draw.leave`, one.
  """
  records = np.flatnonzero(allowed)
  group = np.arange(len(source.labels)) if source.group is None else source.group
  units, first = np.unique(group[records], return_index=True)
  first = records[first]
  domains = np.zeros_like(source.labels) if source.domains is None else source.domains
  strata, member = np.unique(
    np.stack([source.labels[first], domains[first]]), axis=1, return_inverse=True
  )
  drawn = [units[:0]]
  for index, (label, domain) in enumerate(strata.T.tolist()):
    stratum = units[member == index]
    least = min(1, len(stratum) - 1)
    wanted = max(int(len(stratum) * draw.fraction + 0.5), least)
    count = min(wanted, max(len(stratum) - draw.leave, least))
    order = np.random.RandomState([*draw.seed, label, domain]).permutation(len(stratum))
    drawn.append(stratum[order[:count]])
  return allowed & np.isin(group, np.concatenate(drawn))


def make_split_id(source: DataSource, config: TasksConfig) -> str:
  """Returns the name of `make_split`: what the data have of their own, what was drawn, and how."""
  if source.split_name is not None:
    return f"{source.name}/{source.split_name}"
  published = _published(source, config)
  has_val, has_test = (published is not None and np.any(published == code) for code in (VAL, TEST))
  val = "own" if has_val else f"{config.val_fraction:g}"
  test = "own" if has_test else f"{config.test_fraction:g}"
  if config.test_from == "val":
    test = "val"
  seed = "" if val == test == "own" else f"-seed{config.split_seed}"
  return f"{source.name}/val{val}-test{test}{seed}"


def make_manifest(source: DataSource, codes: Int8[np.ndarray, " n"]) -> str:
  """Returns the sha256 hex of the data and the split of each record, TRAIN, VAL or TEST."""

  def sha256(values):
    if values is None:
      return None
    return hashlib.sha256(np.ascontiguousarray(values, "<i8").tobytes()).hexdigest()

  facts = {
    "n": len(source.labels),
    "labels": sha256(source.labels),
    "domains": sha256(source.domains),
    "source": source.digest,
  }
  facts |= {split: sha256(np.flatnonzero(codes == code)) for split, code in SPLIT_CODES.items()}
  text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
  return hashlib.sha256(text.encode()).hexdigest()


def refuse_empty_classes(sequence: TaskSequence) -> None:
  """Raises ConfigError if a class of a task has no image for training or none for test."""
  for task in sequence.tasks:
    for split in ("train", "test"):
      counts = np.bincount(sequence.labels[getattr(task, split)], minlength=sequence.num_classes)
      empty = [sequence.class_names[p] for p in range(task.lo, task.hi) if not counts[p]]
      if empty:
        raise ConfigError(
          f"{sequence.source.name}: no {split} image of class {', '.join(map(repr, empty[:10]))}"
          f"{' ...' if len(empty) > 10 else ''} in task {task.index + 1} ({task.name}): every "
          "class needs one for training and one for test; add images, or move the class away"
        )
