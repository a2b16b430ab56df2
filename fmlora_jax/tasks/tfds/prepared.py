"""Splits that TFDS prepared as array_record, read without TensorFlow, and their manifests.

Pixels are decoded by Pillow: the decoder of TFDS without TensorFlow gives CMYK images four channels
and takes the indices of a palette for grey. What the first look at a split finds is kept beside the
data as its manifest, and must never change.
"""

import dataclasses
import difflib
import hashlib
import io
import json
import logging
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int, UInt8

from fmlora_jax.config import ConfigError, TasksConfig
from fmlora_jax.tasks import images
from fmlora_jax.tasks.sequence import TEST, TRAIN, VAL
from fmlora_jax.tasks.splits import Codes
from fmlora_jax.tasks.tfds import index

MAX_LISTED = 10  # files in one message

_log = logging.getLogger(__name__)


def data_root(data_dir: str | None) -> pathlib.Path:
  """Returns the folder that holds the prepared data; None takes a folder of our own.

  It is none of TFDS's: there, a build of other programs may lie in TFRecord, which can't be read.
  """
  if data_dir:
    return pathlib.Path(data_dir).expanduser()
  return pathlib.Path(tfds.core.constants.DATA_DIR).expanduser() / "array_record"


def get_builder(name: str, root: pathlib.Path, benchmark: str) -> tfds.core.DatasetBuilder:
  """Returns the builder `name`, whose `info.splits` are empty if its data are not prepared.

  Raises:
    ConfigError: if TFDS knows no such name, or the data below `root` are TFRecord.
  """
  try:
    return tfds.builder(name, data_dir=root, file_format="array_record")
  except tfds.core.DatasetNotFoundError:
    near = difflib.get_close_matches(name, tfds.list_builders(with_community_datasets=False), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(
      f"config.tasks.benchmark is {benchmark!r}: TFDS knows no data set {name!r}{hint}"
    ) from None
  except (ValueError, RuntimeError) as error:
    if "File format is already set" in str(error):
      raise ConfigError(
        f"config.tasks.data_dir is {str(root)!r}: it holds {name} as TFRecord, which needs "
        "TensorFlow to be read; prepare it in another folder: "
        f"{_command(benchmark, root / 'array_record')}"
      ) from None
    raise ConfigError(f"TFDS can't open {name!r}: {str(error).strip().splitlines()[-1]}") from None


def _command(benchmark: str, root: pathlib.Path) -> str:
  return f"python -m fmlora_jax.prepare {benchmark} --data_dir={root}"


def open_builder(name: str, root: pathlib.Path, benchmark: str) -> tfds.core.DatasetBuilder:
  """Returns the builder of prepared data.

  Raises:
    ConfigError: as `get_builder`, or if the data are not prepared below `root`.
  """
  builder = get_builder(name, root, benchmark)
  if not builder.info.splits:
    others = sorted(p.name for p in pathlib.Path(builder.data_path).parent.glob("*.*.*"))
    found = f" (found version {', '.join(others)}, needed {builder.version})" if others else ""
    raise ConfigError(
      f"config.tasks.data_dir is {str(root)!r}: {name} is not prepared there{found}; do so once "
      f"with: {_command(benchmark, root)}"
    )
  return builder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
  """One prepared split, and what is known of all its records; safe to pickle.

  Attributes:
    files: where it lies.
    data: record position -> dict of features, the image as the bytes of its file.
    image, label: names of the two features that count.
    known: of its records.
  """

  files: index.Files
  data: Any
  image: str
  label: str
  known: index.RecordIndex

  @property
  def name(self) -> str:
    """Such as "domainnet/real train"."""
    return self.files.split

  @property
  def labels(self) -> Int[np.ndarray, " n"]:
    return self.known.labels

  @property
  def sizes(self) -> Int[np.ndarray, "n 2"]:
    return self.known.sizes

  def pixels(self, position: int, side: int, max_pixels: int) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the image of one record, shorter side `side`; call within `images.threads`.

    Raises:
      ConfigError: if it can't be read or decoded, or is not what it was at the first look.
    """
    try:
      content = index.image_bytes(index.read(self.data.__getitem__, position), self.image)
      if index.content_hash(content) != self.known.contents[position]:
        raise images.BrokenImage("it has changed since it was first used")
      image = images.decode(io.BytesIO(content), max_pixels)
    except images.BrokenImage as error:
      raise ConfigError(
        f"{self.files.shown(position)} can't be used: {error}; remove the folder of "
        f"{self.name.split()[0]} and prepare it again"
      ) from error
    return np.asarray(images.resize_shorter_side(image, side))

  def file_names(self) -> list[str]:
    """Returns the feature `file_name` of each record, all of which are read for it."""
    blocks = index.blocks(len(self.data))
    records = (record for rows in blocks for record in self.data.__getitems__(rows))
    return [record["file_name"].decode() for record in records]


class Prepared:
  """A prepared builder and its manifest.

  The manifest is `.fmlora_manifest_<builder>_<version>.json` in the data folder: of each split that
  was used the number of records, the histogram of labels, all labels, image sizes and hashes of
  contents in reading order, and their sha256; of each cut, the numbers of images and a sha256. What
  it says once must hold ever after, and only the first run looks at each record.
  """

  def __init__(self, name: str, config: TasksConfig):
    self._root, self._config = data_root(config.data_dir), config
    self.builder = open_builder(name, self._root, config.benchmark)
    self.name, self.version = name, str(self.builder.version)
    stem = f".fmlora_manifest_{name.replace('/', '-')}_{self.version}"
    self._path = self._root / f"{stem}.json"
    self._manifest = self._read_manifest()
    self.image = self._feature(tfds.features.Image, "image")
    self.label = self._feature(tfds.features.ClassLabel, "label")
    self.class_names = tuple(self.builder.info.features[self.label].names)

  def _feature(self, kind: type, usual: str) -> str:
    """Returns the name of the feature that images or labels are taken from."""
    features = self.builder.info.features
    found = [name for name, feature in features.items() if isinstance(feature, kind)]
    if usual in found:
      return usual
    if len(found) == 1:
      return found[0]
    raise ConfigError(
      f"config.tasks.benchmark is {self._config.benchmark!r}: must have one feature of type "
      f"{kind.__name__}, has {found or 'none'}"
    )

  def split(self, name: str) -> Split:
    """Returns the split `name`; the first time, each record is looked at.

    Raises:
      ConfigError: if there is no such split, a file of it is missing, a record can't be used, or
        the manifest says otherwise.
    """
    splits = self.builder.info.splits
    if name not in splits:
      raise ConfigError(
        f"{self.name} in {str(self._root)!r} has no split {name!r}, but {', '.join(splits)}: "
        "prepare it again"
      )
    paths = [pathlib.Path(path) for path in splits[name].filepaths]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
      raise ConfigError(
        f"{self.name} in {str(self._root)!r} lacks {', '.join(missing[:MAX_LISTED])}: remove "
        f"{str(self.builder.data_path)!r} and prepare it again"
      )
    raw = {
      key: tfds.decode.SkipDecoding()
      for key, feature in self.builder.info.features.items()
      if isinstance(feature, tfds.features.Image)
    }
    files = index.Files(
      split=f"{self.name} {name}",
      paths=tuple(paths),
      lengths=tuple(splits[name].shard_lengths),
    )
    try:
      data = self.builder.as_data_source(name, decoders=raw)
      num = len(data)
    except Exception as error:  # array_record raises what its C++ says
      raise self._damaged(files, error) from None
    if num != sum(files.lengths):
      raise self._damaged(files, f"it holds {num} records, must hold {sum(files.lengths)}")
    known = self._known(name, data, files)
    return Split(files=files, data=data, image=self.image, label=self.label, known=known)

  def _damaged(self, files: index.Files, reason: Any) -> ConfigError:
    names = ", ".join(path.name for path in files.paths[:MAX_LISTED])
    return ConfigError(
      f"{files.split} in {str(self._root)!r} can't be read ({' '.join(str(reason).split())}), of "
      f"{names}: remove {str(self.builder.data_path)!r} and prepare it again"
    )

  def _known(self, name: str, data, files: index.Files) -> index.RecordIndex:
    """Returns what the manifest says of a split, or what its records say, which goes into it."""
    known, shards = self._manifest["splits"].get(name), _stamps(files.paths)
    if known and known["shards"] == shards and "contents" in known:
      kept = index.unpack(known)
      if kept.digests() != known["sha256"]:
        raise ConfigError(f"{self._path} is damaged at {name!r}: remove it")
      return kept
    found = index.index_records(files, data, (self.image, self.label), self._config.max_pixels)
    digests = found.digests()
    # a manifest of before there were hashes of contents has none, which is no difference
    if known and any(digests[key] != digest for key, digest in known["sha256"].items()):
      before = index.unpack(known) if "contents" in known else None
      raise ConfigError(
        f"{self.name} {name} in {str(self._root)!r} has other labels, images or order than when "
        f"first used ({index.first_change(files, before, found)}): prepare it again, or remove "
        f"{self._path.name} there if this was meant"
      )
    self._manifest["splits"][name] = {
      "num": len(found.labels),
      "histogram": np.bincount(found.labels, minlength=len(self.class_names)).tolist(),
      "sha256": digests,
      "shards": shards,
      **found.packed(),
    }
    self._write_manifest()
    return found

  def pin(self, cut: str, codes: Codes) -> None:
    """Keeps what a cut of these records is, or refuses one that has changed."""
    facts = {
      "train": int(np.sum(codes == TRAIN)),
      "val": int(np.sum(codes == VAL)),
      "test": int(np.sum(codes == TEST)),
      "sha256": hashlib.sha256(codes.astype(np.int8).tobytes()).hexdigest(),
    }
    known = self._manifest["cuts"].setdefault(cut, facts)
    if known is facts:
      self._write_manifest()
    elif known != facts:
      raise ConfigError(
        f"config.tasks.split is {cut!r}: its cut of {self.name} has changed; {self._path.name} in "
        f"{str(self._root)!r} says {known}, now it is {facts}; remove that file if this was meant"
      )

  def _read_manifest(self) -> dict:
    if not self._path.exists():
      return {"builder": self.name, "version": self.version, "splits": {}, "cuts": {}}
    try:
      manifest = json.loads(self._path.read_text())
      return {**manifest, "splits": dict(manifest["splits"]), "cuts": dict(manifest["cuts"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise ConfigError(f"{self._path} can't be read ({error}): remove it") from None

  def _write_manifest(self) -> None:
    part = self._path.with_name(f"{self._path.name}.{os.getpid()}.part")
    try:
      part.write_text(json.dumps(self._manifest, indent=1, sort_keys=True))
      os.replace(part, self._path)
    except OSError as error:
      _log.warning("%s: can't be written (%s); the next run looks again", self._path, error)


def _stamps(paths: Sequence[pathlib.Path]) -> dict[str, list[int]]:
  """Returns size in bytes and time of change of each file; a copied file is looked at again."""
  return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}
