"""Data that TFDS prepared as array_record, read without TensorFlow.

Pixels are decoded by Pillow: TFDS's decoder without TensorFlow gives CMYK images four channels and
takes the indices of a palette for grey.
"""

import dataclasses
import difflib
import importlib.util
import io
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8, UInt16
from tensorflow_datasets.core import constants

from fmlora_jax.config import ConfigError, TasksConfig
from fmlora_jax.tasks import images
from fmlora_jax.tasks.tfds import index
from fmlora_jax.tasks.tfds.manifest import Manifest

MAX_LISTED = 10  # files in one message
PEEKED = 64  # records that tell whether a split has labels


def data_root(data_dir: str | None) -> pathlib.Path:
  """Returns the folder of the prepared data; None takes `array_record` in TFDS's default folder.

  Not that folder itself, which may hold a TFRecord build that we cannot read.
  """
  if data_dir:
    return pathlib.Path(data_dir).expanduser()
  return pathlib.Path(constants.DATA_DIR).expanduser() / "array_record"


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
    other = f" (found version {', '.join(others)}, needed {builder.version})" if others else ""
    raise ConfigError(
      f"config.tasks.data_dir is {str(root)!r}: {name} is not prepared there{other}; do so once "
      f"with: {_command(benchmark, root)}"
    )
  return builder


def missing(names: Sequence[str], root: pathlib.Path, benchmark: str) -> list[str]:
  """Returns why builders of a benchmark can't be read, a line for all that are not prepared."""
  problems, absent = [], []
  for name in names:
    try:
      open_builder(name, root, benchmark)
    except ConfigError as error:
      is_absent = "is not prepared there;" in str(error)
      (absent if is_absent else problems).append(name if is_absent else str(error))
  if absent:
    verb = "is" if len(absent) == 1 else "are"
    problems.append(
      f"config.tasks.data_dir is {str(root)!r}: {', '.join(absent)} {verb} not prepared there; do "
      f"so once with: {_command(benchmark, root)}"
    )
    if importlib.util.find_spec("tensorflow") is None:
      problems.append(f"preparing needs TensorFlow: {sys.executable} -m pip install tensorflow-cpu")
  return problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedSplit:
  """One published split with its index; can be pickled.

  Attributes:
    files: that hold it.
    data: record position -> dict of features, the image as the bytes of its file.
    image: name of the feature with the image.
    index: of its records.
  """

  files: index.SplitFiles
  data: Any
  image: str
  index: index.RecordIndex

  @property
  def name(self) -> str:
    """Such as "domainnet/real train"."""
    return self.files.split

  @property
  def labels(self) -> UInt16[np.ndarray, " n"]:
    return self.index.labels

  def pixels(self, position: int, side: int) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the image of one record, shorter side `side`; call within `images.threads`.

    Raises:
      ConfigError: if it can't be read or decoded, or differs from the index.
    """
    try:
      content = index.image_bytes(index.read(self.data.__getitem__, position), self.image)
      if index.content_hash(content) != self.index.contents[position]:
        raise images.BrokenImage("it has changed since it was first used")
      image = images.decode(io.BytesIO(content))
    except images.BrokenImage as error:
      raise ConfigError(
        f"{self.files.shown(position)} can't be used: {error}; move the folder of "
        f"{self.name.split()[0]} away and prepare it again"
      ) from error
    return np.asarray(images.resize_shorter_side(image, side))

  def file_names(self) -> list[str]:
    """Returns the feature `file_name` of each record; reads all records for it."""
    blocks = index.blocks(len(self.data))
    records = (record for rows in blocks for record in self.data.__getitems__(rows))
    return [record["file_name"].decode() for record in records]


class PreparedData:
  """The prepared data of one builder, and their manifest.

  Args:
    name: of the builder.
    config: says where the data are.
  """

  def __init__(self, name: str, config: TasksConfig):
    self._root, self._config = data_root(config.data_dir), config
    self.builder = open_builder(name, self._root, config.benchmark)
    self.name, self.version = name, str(self.builder.version)
    self.manifest = Manifest(self._root, name, self.version)
    self._image = self._feature(tfds.features.Image, "image")
    self._label = self._feature(tfds.features.ClassLabel, "label")
    self.class_names = tuple(cast(Any, self._features[self._label]).names)

  @property
  def _features(self) -> tfds.features.FeaturesDict:
    return cast(tfds.features.FeaturesDict, self.builder.info.features)

  def _feature(self, kind: type, usual: str) -> str:
    """Returns the name of the feature that images or labels are taken from."""
    names = [name for name, feature in self._features.items() if isinstance(feature, kind)]
    if usual in names:
      return usual
    if len(names) == 1:
      return names[0]
    raise ConfigError(
      f"config.tasks.benchmark is {self._config.benchmark!r}: must have one feature of type "
      f"{kind.__name__}, has {names or 'none'}"
    )

  def has_labels(self, name: str) -> bool:
    """Returns whether any of the first records of a published split has a label."""
    data = self._open(name, self._files(name))
    try:
      records = index.read(data.__getitems__, range(min(PEEKED, len(data))))
    except images.BrokenImage:
      return True  # `split` names the record
    labels = [record[self._label] for record in records]
    return any(label is not None and label >= 0 for label in labels)

  def split(self, name: str) -> PreparedSplit:
    """Returns the published split `name`; on first use all its records are indexed.

    Raises:
      ConfigError: if there is no such split, a file is missing, a record can't be used, or the
        manifest says otherwise.
    """
    files = self._files(name)
    data = self._open(name, files)
    keys, max_pixels = (self._image, self._label), self._config.max_pixels
    known = self.manifest.index(
      name,
      files,
      len(self.class_names),
      lambda: index.index_records(files, data, keys, max_pixels),
    )
    return PreparedSplit(files=files, data=data, image=self._image, index=known)

  def _files(self, name: str) -> index.SplitFiles:
    splits = self.builder.info.splits
    if name not in splits:
      raise ConfigError(
        f"{self.name} in {str(self._root)!r} has no split {name!r}, but {', '.join(splits)}: "
        "prepare it again"
      )
    paths = tuple(pathlib.Path(path) for path in splits[name].filepaths)
    if missing := [path.name for path in paths if not path.is_file()]:
      raise ConfigError(
        f"{self.name} in {str(self._root)!r} lacks {', '.join(missing[:MAX_LISTED])}: move "
        f"{str(self.builder.data_path)!r} away and prepare it again"
      )
    lengths = tuple(splits[name].shard_lengths)
    return index.SplitFiles(split=f"{self.name} {name}", paths=paths, lengths=lengths)

  def _open(self, name: str, files: index.SplitFiles) -> Any:
    raw = {
      key: tfds.decode.SkipDecoding()
      for key, feature in self._features.items()
      if isinstance(feature, tfds.features.Image)
    }
    try:
      data = cast(Any, self.builder).as_data_source(name, decoders=raw)  # declared without split
      num = len(data)
    except Exception as error:  # array_record raises errors of its C++ code
      raise self._damaged(files, error) from None
    if num != sum(files.lengths):
      raise self._damaged(files, f"it holds {num} records, must hold {sum(files.lengths)}")
    return data

  def _damaged(self, files: index.SplitFiles, reason: Any) -> ConfigError:
    names = ", ".join(path.name for path in files.paths[:MAX_LISTED])
    return ConfigError(
      f"{files.split} in {str(self._root)!r} can't be read ({' '.join(str(reason).split())}), of "
      f"{names}: move {str(self.builder.data_path)!r} away and prepare it again"
    )
