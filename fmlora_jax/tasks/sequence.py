"""Task sequences: a data source in splits (train, val, test) and tasks over one label space."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Int, Int8, UInt8

from fmlora_jax.config import ConfigError, TasksConfig
from fmlora_jax.types import SequenceSpec

TRAIN, VAL, TEST = 0, 1, 2
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
    domains: domain of each record; None without domains.
    domain_names: by domain.
    group: of each record; a split that is drawn never divides a group. Copies of one image are a
      group. None: each record is its own group, and copies are unknown.
    shown: record -> name of the record for people.
  """

  name: str
  labels: Int[np.ndarray, " n"]
  class_names: tuple[str, ...]
  canvas: tuple[int, int]
  decode: Callable[[np.ndarray], tuple[UInt8[np.ndarray, "k h w 3"], Int[np.ndarray, "k 2"]]]
  digest: str
  split: Int8[np.ndarray, " n"] | None = None
  split_name: str | None = None
  domains: Int[np.ndarray, " n"] | None = None
  domain_names: tuple[str, ...] = ()
  group: Int[np.ndarray, " n"] | None = None
  shown: Callable[[int], str] = "record {}".format


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """One task: ascending record indices (int64) of its splits, and its label positions lo..hi-1."""

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
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copies:
  """Images of one split that are also in another.

  Attributes:
    val_of_train, test_of_train, test_of_val: their numbers.
    example: the first copy and its original, in words; None where there is none.
  """

  val_of_train: int
  test_of_train: int
  test_of_val: int
  example: str | None

  def __str__(self) -> str:
    return (
      f"{self.val_of_train} validation and {self.test_of_train} test images are copies of training "
      f"images, {self.test_of_val} test images of validation images"
    )


def find_copies(sequence: TaskSequence) -> Copies | None:
  """Returns the images that are in two splits; None where the source does not tell copies."""
  group = sequence.source.group
  if group is None:
    return None
  rows = {
    split: np.concatenate([getattr(task, split) for task in sequence.tasks])
    for split in SPLIT_CODES
  }
  counts, example = {}, None
  for split, of in (("val", "train"), ("test", "train"), ("test", "val")):
    copies = rows[split][np.isin(group[rows[split]], group[rows[of]])]
    counts[f"{split}_of_{of}"] = len(copies)
    if example is None and len(copies):
      first = copies[0]
      (same, *_) = rows[of][group[rows[of]] == group[first]].tolist()
      example = f"{sequence.source.shown(int(first))} is {sequence.source.shown(same)}"
  return Copies(**counts, example=example)


def report_copies(sequence: TaskSequence, config: TasksConfig, *, warn: bool) -> None:
  """Logs copies in two splits, if `warn`, or refuses them, as config.copies says."""
  copies = find_copies(sequence)
  if copies is None or copies.example is None:
    return
  text = f"{copies}, such as {copies.example}"
  if config.copies == "refuse":
    raise ConfigError(
      f"config.tasks.copies is 'refuse': {sequence.split_id}: {text}; move them out of one side, "
      "or set it to report"
    )
  if warn:
    _log.warning(
      "%s: %s: move them out of one side, or the accuracies are too good", sequence.split_id, text
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
  codes = _split(source, config)
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
    split_id=_split_id(source, config),
    manifest_sha256=_manifest(source, codes),
  )
  _refuse_empty_classes(sequence)
  return sequence


def _class_tasks(source, config, seed):
  """Returns the class order and a function: labels -> (name, lo, hi, mask) of each cil task."""
  count = len(source.class_names)
  check_divides(config.num_tasks, count, source.name)
  size = count // config.num_tasks

  def members(labels):
    for lo in range(0, count, size):
      name = f"class {lo}" if size == 1 else f"classes {lo}-{lo + size - 1}"
      yield name, lo, lo + size, (labels >= lo) & (labels < lo + size)

  return make_order(count, config.order, seed), members


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


def _has_split(source: DataSource, code: int) -> bool:
  return source.split is not None and bool(np.any(source.split == code))


def _split(source: DataSource, config: TasksConfig) -> Int8[np.ndarray, " n"]:
  """Returns TRAIN, VAL or TEST of each record.

  Published splits are taken. A missing one is drawn from the training images, per class and domain:
  first test, then val. The draw of a class depends on split_seed and on that class alone.
  """
  if source.split_name is not None and source.split is not None:
    return source.split
  codes = np.full(len(source.labels), TRAIN, np.int8)
  if source.split is not None:
    codes = np.maximum(source.split, TRAIN)
  draws_val = config.val_fraction > 0 and not _has_split(source, VAL)
  if not _has_split(source, TEST):
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


def _split_id(source: DataSource, config: TasksConfig) -> str:
  if source.split_name is not None:
    return f"{source.name}/{source.split_name}"
  val = "own" if _has_split(source, VAL) else f"{config.val_fraction:g}"
  test = "own" if _has_split(source, TEST) else f"{config.test_fraction:g}"
  seed = "" if val == test == "own" else f"-seed{config.split_seed}"
  return f"{source.name}/val{val}-test{test}{seed}"


def _manifest(source: DataSource, codes: Int8[np.ndarray, " n"]) -> str:
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


def _refuse_empty_classes(sequence: TaskSequence) -> None:
  for task in sequence.tasks:
    for split in ("train", "test"):
      counts = np.bincount(sequence.labels[getattr(task, split)], minlength=sequence.num_classes)
      empty = [sequence.class_names[p] for p in range(task.lo, task.hi) if not counts[p]]
      if empty:
        raise ConfigError(
          f"{sequence.source.name}: no {split} image of class {', '.join(map(repr, empty[:10]))}"
          f"{' ...' if len(empty) > 10 else ''} in task {task.index} ({task.name}): every class "
          "needs one for training and one for test; add images, or move the class away"
        )
