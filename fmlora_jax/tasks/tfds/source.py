"""Data sources of benchmarks whose published splits TFDS prepared."""

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int, UInt8

from fmlora_jax.config import ConfigError, TasksConfig
from fmlora_jax.tasks import images
from fmlora_jax.tasks.sequence import TEST, TRAIN, VAL, DataSource
from fmlora_jax.tasks.splits import Records, SplitRule, with_val
from fmlora_jax.tasks.tfds.prepared import PreparedData, PreparedSplit, data_root

TFDS_SPLITS = {"train": TRAIN, "validation": VAL, "test": TEST}  # by TFDS's names

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
  """`DataSource.decode` for the records of several splits, one split after the other."""

  splits: tuple[PreparedSplit, ...]
  canvas: tuple[int, int]
  side: int
  max_pixels: int

  def __call__(
    self, rows: Int[np.ndarray, " k"]
  ) -> tuple[UInt8[np.ndarray, "k h w 3"], Int[np.ndarray, "k 2"]]:
    def pixels(index):
      split, position = _locate(self.splits, int(rows[index]))
      return split.pixels(position, self.side)

    return images.on_canvases(len(rows), self.canvas, pixels, self.max_pixels)


@dataclasses.dataclass(frozen=True)
class PublishedSplit:
  """A published split that a benchmark takes.

  Attributes:
    builder, split: as TFDS names them.
    num_published: records in the publication; None if unknown.
    domain: index of the benchmark's domain.
    is_test: whether it is the test set whatever TFDS calls it.
  """

  builder: str
  split: str
  num_published: int | None = None
  domain: int = 0
  is_test: bool = False

  @property
  def code(self) -> int:
    """TRAIN, VAL or TEST."""
    return TEST if self.is_test else TFDS_SPLITS[self.split]


def usable_splits(name: str, config: TasksConfig) -> list[PublishedSplit]:
  """Returns the splits of the builder `name` that are for training, validation or test.

  Test images without labels, as of a challenge, are left out. Where validation images are the only
  labelled ones beside those for training, they are what all report, so they are the test set.

  Raises:
    ConfigError: if there is none, or the data are not prepared.
  """
  prepared = PreparedData(name, config)
  names = list(prepared.builder.info.splits)
  if ignored := [split for split in names if split not in TFDS_SPLITS]:
    _log.warning("%s: splits %s are not used", name, ", ".join(ignored))
  known = [split for split in TFDS_SPLITS if split in names]
  usable = [split for split in known if prepared.has_labels(split)]
  if not usable:
    raise ConfigError(
      f"config.tasks.benchmark is {config.benchmark!r}: must have one of the splits "
      f"{', '.join(TFDS_SPLITS)} with labels, has {', '.join(names)}"
    )
  if unlabelled := [split for split in known if split not in usable]:
    _log.warning("%s: splits %s have no labels and are not used", name, ", ".join(unlabelled))
  if usable != ["train", "validation"]:
    return [PublishedSplit(name, split) for split in usable]
  _log.info("%s: the published validation images are the test images", name)
  return [PublishedSplit(name, split, is_test=split == "validation") for split in usable]


def make_source(
  config: TasksConfig,
  side: int,
  published: Sequence[PublishedSplit],
  *,
  rules: Mapping[str, SplitRule] | None = None,
  domain_names: Sequence[str] = (),
) -> DataSource:
  """Returns the records of published splits, one split after the other, as one source.

  Classes are numbered by the rank of their TFDS label among the labels present.

  Args:
    config: names the data folder and the split rule.
    side: shorter side in pixels that images are resized to.
    published: splits of one builder, or of several with the same classes.
    rules: split rules by name, the default first. Without any, the published splits are taken, and
      a missing one is drawn as the config says.
    domain_names: of the domains of `published`.

  Raises:
    ConfigError: if data are missing, can't be used, or have changed since their first use.
  """
  prepared = _open(published, config)
  splits = tuple(prepared[each.builder].split(each.split) for each in published)
  counts = [len(split.labels) for split in splits]
  _warn_of_counts(published, splits)
  used, labels = np.unique(np.concatenate([s.labels for s in splits]), return_inverse=True)
  domains = np.repeat([each.domain for each in published], counts)
  records = Records(
    origin=np.repeat(np.arange(len(published)), counts),
    official=np.repeat([each.code for each in published], counts).astype(np.int8),
    stratum=domains * len(used) + labels,
    names=lambda: [name for split in splits for name in split.file_names()],
    root=data_root(config.data_dir),
  )
  split_name, codes = None, records.official if len(published) > 1 else None
  if rules:
    split_name = config.split or next(iter(rules))
    codes = rules[split_name](records)
    builders = np.repeat([each.builder for each in published], counts)
    for name, data in prepared.items():
      data.manifest.pin(split_name, codes[builders == name])
  canvas = _canvas(splits, side)
  first = next(iter(prepared.values()))
  return DataSource(
    name=config.benchmark,
    labels=labels.astype(np.int32),
    class_names=tuple(first.class_names[label] for label in used),
    canvas=canvas,
    decode=Decoder(splits=splits, canvas=canvas, side=side, max_pixels=config.max_pixels),
    digest=_digest(prepared, published, splits),
    split=codes,
    split_name=split_name,
    val_splits=with_val(rules or {}),
    domains=domains.astype(np.int32) if domain_names else None,
    domain_names=tuple(domain_names),
    group=_groups(splits),
    shown=functools.partial(_shown, splits),
  )


def _open(published: Sequence[PublishedSplit], config: TasksConfig) -> dict[str, PreparedData]:
  """Returns the prepared data by builder; refuses builders with other classes than the first."""
  prepared = {
    name: PreparedData(name, config) for name in dict.fromkeys(each.builder for each in published)
  }
  first, *others = prepared.values()
  for other in others:
    if other.class_names != first.class_names:
      raise ConfigError(f"{other.name} and {first.name} have other classes: prepare them again")
  return prepared


def _warn_of_counts(published: Sequence[PublishedSplit], splits: Sequence[PreparedSplit]) -> None:
  if odd := [
    f"{split.name} has {len(split.labels)}, published {each.num_published}"
    for each, split in zip(published, splits, strict=True)
    if each.num_published not in (None, len(split.labels))
  ]:
    _log.warning(
      "record counts differ from the published ones, so results are not comparable: %s",
      "; ".join(odd),
    )


def _canvas(splits: Sequence[PreparedSplit], side: int) -> tuple[int, int]:
  """Returns the (height, width) that each resized image fits into."""
  sizes = np.unique(np.concatenate([split.index.sizes for split in splits]), axis=0)
  # .tolist(): products of Python's integers do not overflow
  resized = [images.resized_size(tuple(size), side)[0] for size in sizes.tolist()]
  width, height = np.max(resized, axis=0).tolist()
  return height, width


def _groups(splits: Sequence[PreparedSplit]) -> Int[np.ndarray, " n"]:
  """Returns, for each record, the first record with the same content."""
  contents = np.concatenate([split.index.contents for split in splits])
  _, first, member = np.unique(contents, return_index=True, return_inverse=True)
  return first[member]


def _locate(splits: Sequence[PreparedSplit], record: int) -> tuple[PreparedSplit, int]:
  """Returns the split that holds a record, and its position there."""
  starts = np.cumsum([0, *(len(split.labels) for split in splits)])
  number = int(np.searchsorted(starts, record, side="right")) - 1
  return splits[number], record - int(starts[number])


def _shown(splits: Sequence[PreparedSplit], record: int) -> str:
  """Returns "record 17 of cifar100 test (FILE)"."""
  split, position = _locate(splits, record)
  return split.files.shown(position)


def _digest(prepared: Mapping[str, PreparedData], published, splits) -> str:
  facts = [
    [each.builder, prepared[each.builder].version, each.split, *split.index.digests().values()]
    for each, split in zip(published, splits, strict=True)
  ]
  return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
