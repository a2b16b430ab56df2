"""Labelled images of a benchmark, put together from splits that TFDS prepared."""

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
from fmlora_jax.tasks.splits import Records, SplitRule
from fmlora_jax.tasks.tfds.prepared import Prepared, Split, data_root, open_builder

SPLIT_CODES = {"train": TRAIN, "validation": VAL, "test": TEST}  # what TFDS calls its splits

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
  """`DataSource.decode` of the records of several splits, one split after the other."""

  splits: tuple[Split, ...]
  canvas: tuple[int, int]
  side: int
  max_pixels: int

  def __call__(
    self, rows: Int[np.ndarray, " k"]
  ) -> tuple[UInt8[np.ndarray, "k h w 3"], Int[np.ndarray, "k 2"]]:
    starts = np.cumsum([0, *(len(split.labels) for split in self.splits)])
    parts = np.searchsorted(starts, rows, side="right") - 1

    def pixels(index):
      position = int(rows[index] - starts[parts[index]])
      return self.splits[parts[index]].pixels(position, self.side, self.max_pixels)

    return images.on_canvases(len(rows), self.canvas, pixels)


@dataclasses.dataclass(frozen=True)
class PublishedSplit:
  """A published split that a benchmark takes.

  Attributes:
    builder, split: as TFDS names them.
    published: its number of records; None if we do not know it.
    domain: which of the benchmark's domains it is.
  """

  builder: str
  split: str
  published: int | None = None
  domain: int = 0


def published(name: str, config: TasksConfig) -> list[str]:
  """Returns the splits of the builder `name` that are for training, validation or test.

  Raises:
    ConfigError: if there is none, or the data are not prepared.
  """
  found = list(open_builder(name, data_root(config.data_dir), config.benchmark).info.splits)
  if ignored := [split for split in found if split not in SPLIT_CODES]:
    _log.warning("%s: splits %s are not used", name, ", ".join(ignored))
  taken = [split for split in SPLIT_CODES if split in found]
  if not taken:
    raise ConfigError(
      f"config.tasks.benchmark is {config.benchmark!r}: must have one of the splits "
      f"{', '.join(SPLIT_CODES)}, has {', '.join(found)}"
    )
  return taken


def source(
  config: TasksConfig,
  side: int,
  parts: Sequence[PublishedSplit],
  *,
  rules: Mapping[str, SplitRule] | None = None,
  domain_names: Sequence[str] = (),
) -> DataSource:
  """Returns the records of `parts`, part after part, as one source.

  Classes are numbered by the rank of their TFDS label among the labels present.

  Args:
    config: says where the data are, and names the cut.
    side: shorter side in pixels that images are kept at.
    parts: published splits, of one builder or of several with the same classes.
    rules: by name of the split, the default first. Without any, the published splits are taken,
      and what they lack is drawn as the config says.
    domain_names: of the domains of `parts`.

  Raises:
    ConfigError: if data are missing, can't be used, or are not what they were.
  """
  prepared = {name: Prepared(name, config) for name in dict.fromkeys(p.builder for p in parts)}
  first, *others = prepared.values()
  for other in others:
    if other.class_names != first.class_names:
      raise ConfigError(f"{other.name} and {first.name} have other classes: prepare them again")
  splits = tuple(prepared[part.builder].split(part.split) for part in parts)
  counts = [len(split.labels) for split in splits]
  if odd := [
    f"{split.name} {count} ({part.published})"
    for part, split, count in zip(parts, splits, counts, strict=True)
    if part.published not in (None, count)
  ]:
    _log.warning("not the (published) number of records, so not comparable: %s", ", ".join(odd))
  used, labels = np.unique(np.concatenate([s.labels for s in splits]), return_inverse=True)
  domains = np.repeat([part.domain for part in parts], counts)
  pool = Records(
    part=np.repeat(np.arange(len(parts)), counts),
    official=np.repeat([SPLIT_CODES[part.split] for part in parts], counts).astype(np.int8),
    stratum=domains * len(used) + labels,
    names=lambda: [name for split in splits for name in split.file_names()],
    root=data_root(config.data_dir),
  )
  if rules:
    split_name = config.split or next(iter(rules))
    split = rules[split_name](pool)
    owners = np.repeat([part.builder for part in parts], counts)
    for name, builder in prepared.items():
      builder.pin(split_name, split[owners == name])
  else:
    split_name, split = None, pool.official if len(parts) > 1 else None
  sizes = [images.resized_size(size, side)[0] for size in _distinct(splits)]
  width, height = np.max(sizes, axis=0).tolist()
  return DataSource(
    name=config.benchmark,
    labels=labels.astype(np.int32),
    class_names=tuple(first.class_names[label] for label in used),
    canvas=(height, width),
    decode=Decoder(splits=splits, canvas=(height, width), side=side, max_pixels=config.max_pixels),
    digest=_digest(prepared, parts, splits),
    split=split,
    split_name=split_name,
    domains=domains.astype(np.int32) if domain_names else None,
    domain_names=tuple(domain_names),
    group=_groups(splits),
    shown=functools.partial(_shown, splits),
  )


def _groups(splits: Sequence[Split]) -> Int[np.ndarray, " n"]:
  """Returns the first record with the same content, of each record."""
  contents = np.concatenate([split.known.contents for split in splits])
  _, first, member = np.unique(contents, return_index=True, return_inverse=True)
  return first[member]


def _shown(splits: Sequence[Split], record: int) -> str:
  """Returns a record of several splits, one split after the other, as its own split shows it."""
  starts = np.cumsum([0, *(len(split.labels) for split in splits)])
  part = int(np.searchsorted(starts, record, side="right")) - 1
  return splits[part].files.shown(record - int(starts[part]))


def _distinct(splits: Sequence[Split]) -> list[tuple[int, int]]:
  """Returns each (width, height) that any image has."""
  sizes = np.unique(np.concatenate([split.sizes for split in splits]), axis=0)
  return [tuple(size) for size in sizes.tolist()]  # Python's integers: these do not overflow


def _digest(prepared: Mapping[str, Prepared], parts, splits) -> str:
  facts = [
    [part.builder, prepared[part.builder].version, part.split, *s.known.digests().values()]
    for part, s in zip(parts, splits, strict=True)
  ]
  return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
