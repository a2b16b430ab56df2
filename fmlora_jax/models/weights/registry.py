"""Pre-trained weights: loading a file, published or another, as parameters of our ViT.

A tag names one published checkpoint; "ViT-B/16" alone has meant three networks in timm. Pickles are
never opened. A new checkpoint is one entry of `published.WEIGHTS`, a new kind of file one entry
of `layouts.LAYOUTS`.
"""

import contextlib
import dataclasses
import difflib
import json
import pathlib
import sys
from collections.abc import Iterator, Mapping

import jax
from absl import logging

from fmlora_jax.config import ConfigError, WeightsConfig
from fmlora_jax.models import vit
from fmlora_jax.models.weights import download, layouts
from fmlora_jax.models.weights import files as weight_files
from fmlora_jax.models.weights.published import WEIGHTS, Checkpoint, CheckpointFile
from fmlora_jax.types import Params, Sizes

GELUS = {"gelu": "erf", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}  # transformers' names


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightsInfo:
  """Facts about loaded weights, for the log, the checkpoint and result.json.

  Attributes:
    tag: as in the config; "file" without one.
    file: the file's name without its folder; None for random weights.
    sha256: of the file; None for random weights.
    normalisation: of pixels in training; None if the file does not say, so that
      config.input.normalisation must.
    ignored: unused tensors of the file, by their names on disk.
  """

  tag: str
  file: str | None
  sha256: str | None
  normalisation: str | None
  ignored: tuple[str, ...] = ()


UNKNOWN = WeightsInfo(tag="unknown", file=None, sha256=None, normalisation=None)


def load(config: WeightsConfig, image_size: int | None = None) -> tuple[Params, Sizes, WeightsInfo]:
  """Returns (params as float32 NumPy arrays, sizes of the ViT, facts about them).

  Args:
    image_size: side in pixels of the images; positions are interpolated to it. None takes
      the architecture's.

  Raises:
    ConfigError: if there is no file, with where to get it; if a field or the file can't be used.
  """
  _check_fields(config)
  if config.tag == "random":
    return _draw(config, image_size)
  with _located(config) as path:
    return _convert(config, image_size, path)


def check(config: WeightsConfig, image_size: int | None = None) -> Sizes | None:
  """Returns the sizes of the ViT without reading its file; None where only the file tells them.

  Raises:
    ConfigError: if a field can't be used.
  """
  _check_fields(config)
  source = WEIGHTS[config.tag] if config.tag else None
  if (source and source.architecture) or config.architecture:
    source = source or Checkpoint(files=(), architecture=config.architecture, normalisation=None)
    return _sizes(config, source, image_size)
  return None


def _convert(
  config: WeightsConfig, image_size: int | None, path: pathlib.Path
) -> tuple[Params, Sizes, WeightsInfo]:
  """Returns the result of `load` for this file."""
  shown = config.path or path.name
  tensors, metadata = weight_files.read(path, shown)
  layout, digest = layouts.guess_layout(tensors), weight_files.sha256(path)
  if config.tag:
    source = WEIGHTS[config.tag]
    hint = (
      f"is it a file of {config.tag!r}? {source.where}; another file takes "
      f"--config.weights.tag='' --config.weights.architecture={source.architecture} "
      f"--config.input.normalisation={source.normalisation}"
    )
  else:
    source = _describe(config, layout, metadata, shown)
    hint = f"if it is no {source.architecture}, pass --config.weights.architecture=NAME"
  file = next((file for file in source.files if file.layout == layout), source.files[0])
  if file.sha256 not in (None, digest):
    raise ConfigError(f"{shown} has sha256 {digest}: must be {file.sha256}; {hint}")
  sizes = _sizes(config, source, image_size, layouts.LAYOUTS[file.layout].epsilon)
  if file.layout == "hf_vit":
    _check_beside(path.with_name("config.json"), sizes)
  try:
    params, ignored = layouts.convert(
      tensors, file.layout, sizes, truncate=config.depth is not None
    )
  except ValueError as error:
    raise ConfigError(f"{shown}: {error}; {hint}") from None
  logging.info("weights %s: %s, sha256 %s", config.tag or "file", path.name, digest)
  if ignored:
    logging.info("weights: %d tensors ignored: %s", len(ignored), ", ".join(ignored))
  info = WeightsInfo(
    tag=config.tag or "file",
    file=path.name,
    sha256=digest,
    normalisation=source.normalisation,
    ignored=ignored,
  )
  return params, sizes, info


def _check_fields(config: WeightsConfig) -> None:
  """Refuses an unknown tag, and fields that do not go with the tag."""
  if config.tag and config.tag not in WEIGHTS:
    near = difflib.get_close_matches(config.tag, WEIGHTS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"config.weights.tag is {config.tag!r}: must be one of {list(WEIGHTS)}{hint}")
  if config.tag == "random" and config.path is not None:
    raise ConfigError(
      f"config.weights.path is {config.path!r}: tag 'random' reads no file; name the file's tag or "
      "leave the path out"
    )
  if not config.tag and config.path is None:
    raise ConfigError(
      "config.weights.tag is '': must be a tag, or config.weights.path must name a file"
    )
  fixed = config.tag and WEIGHTS[config.tag].architecture
  if fixed and config.architecture not in (None, fixed):
    raise ConfigError(
      f"config.weights.architecture is {config.architecture!r}: tag {config.tag!r} is a {fixed}; "
      "leave it out, or set tag '' for another file, tag 'random' for none"
    )


def _draw(config: WeightsConfig, image_size: int | None) -> tuple[Params, Sizes, WeightsInfo]:
  source = WEIGHTS["random"]
  sizes = _sizes(config, source, image_size)
  params = jax.jit(vit.make_vit(sizes).init)(jax.random.key(0))
  info = WeightsInfo(tag="random", file=None, sha256=None, normalisation=source.normalisation)
  return jax.device_get(params), sizes, info


def _check_beside(path: pathlib.Path, sizes: Sizes) -> None:
  """Refuses sizes that are not those of the config.json that transformers writes beside a file."""
  try:
    facts = json.loads(path.read_text())
  except (OSError, ValueError, RecursionError):
    return
  if not (isinstance(facts, dict) and "model_type" in facts):
    return
  activation = str(facts.get("hidden_act", "gelu"))
  if activation not in GELUS:
    raise ConfigError(f"{path}: hidden_act is {activation!r}: must be one of {', '.join(GELUS)}")
  for field, ours, theirs in (
    ("epsilon is", sizes.epsilon, facts.get("layer_norm_eps")),
    ("gelu is", sizes.gelu, GELUS[activation]),
    ("architecture: num_heads is", sizes.num_heads, facts.get("num_attention_heads", 0)),
  ):
    if theirs and ours != theirs:
      raise ConfigError(f"config.weights.{field} {ours!r}: must be {theirs!r}, as {path} says")


def _sizes(
  config: WeightsConfig, source: Checkpoint, image_size: int | None, epsilon: float = 1e-6
) -> Sizes:
  """Returns the sizes of the architecture at this image size and the config's depth."""
  name = source.architecture or config.architecture
  if name is None or name not in vit.ARCHITECTURES:
    raise ConfigError(
      f"config.weights.architecture is {name!r}: must be one of {sorted(vit.ARCHITECTURES)}"
    )
  full = vit.architecture(name)
  depth = full.depth if config.depth is None else config.depth
  if not 1 <= depth <= full.depth:
    raise ConfigError(f"config.weights.depth is {depth}: must be in 1..{full.depth} for a {name}")
  image_size = full.image_size if image_size is None else image_size
  p = full.patch_size
  if image_size < p or image_size % p:
    near = max(p, round(image_size / p) * p)
    raise ConfigError(
      f"config.input.image_size is {image_size}: must be a multiple of the patch size {p} of a "
      f"{name}, such as {near}"
    )
  gelu, epsilon = config.gelu or source.gelu, config.epsilon or epsilon
  return dataclasses.replace(full, image_size=image_size, depth=depth, gelu=gelu, epsilon=epsilon)


def _describe(
  config: WeightsConfig, layout: str | None, metadata: Mapping[str, str], shown: str
) -> Checkpoint:
  """Returns a description of a file without a tag, from its metadata, its names and the config."""
  if layout is None:
    known = list(layouts.LAYOUTS)
    raise ConfigError(f"{shown}: no tensor has a name as in one of the layouts {known}")
  architecture = config.architecture or metadata.get("architecture")
  if architecture is None:
    raise ConfigError(
      f"config.weights.architecture is not set, and {shown} names none: must be one of "
      f"{sorted(vit.ARCHITECTURES)}"
    )
  normalisation, gelu = metadata.get("normalisation"), metadata.get("gelu", "erf")
  if normalisation not in (None, "half", "zero_one", "imagenet") or gelu not in ("erf", "tanh"):
    raise ConfigError(
      f"{shown}: its metadata say normalisation {normalisation!r}, gelu {gelu!r}: must be one of "
      "half, zero_one, imagenet and one of erf, tanh"
    )
  return Checkpoint(
    files=(CheckpointFile(layout=layout),),
    architecture=architecture,
    normalisation=normalisation,
    gelu=gelu,
  )


@contextlib.contextmanager
def _located(config: WeightsConfig) -> Iterator[pathlib.Path]:
  """Yields the file at the config's path, also in a bucket, or else the tag's."""
  if config.path is None:
    yield fetch(config.tag)
  elif config.path.startswith("gs://"):
    try:
      with download.from_bucket(config.path) as path:
        yield path
    except download.FetchError as error:
      raise ConfigError(
        f"config.weights.path is {config.path!r}: can't be read ({error}); install gcsfs and "
        "get credentials, or copy the file here and name the copy"
      ) from None
  else:
    yield _local(config)


def missing(config: WeightsConfig) -> list[str]:
  """Returns what is missing of the weights, a line each, with what gets it; downloads nothing."""
  if config.path is None and config.tag in WEIGHTS and WEIGHTS[config.tag].files:
    source = WEIGHTS[config.tag]
    file = source.files[0]
    if file.repository and not download.is_cached(file.repository, file.name, file.revision):
      where = f"{source.where} and pass --config.weights.path=FILE"
      fault = f"its file is not on this machine: {where}"
      if not download.has_hub():
        fault += f"; {sys.executable} -m pip install huggingface_hub has runs download it"
      return [f"config.weights.tag is {config.tag!r}: {fault}"]
  elif config.path is not None and "://" not in config.path:
    try:
      _local(config)
    except ConfigError as error:
      return [str(error)]
  return []


def fetch(tag: str) -> pathlib.Path:
  """Returns the tag's file, downloaded if it does not ship with the package.

  Raises:
    ConfigError: if it can't be downloaded, with where to get it.
  """
  source = WEIGHTS[tag]
  file = source.files[0]
  if file.repository:
    try:
      return download.from_hub(file.repository, file.name, file.revision)
    except download.FetchError as error:
      raise ConfigError(
        f"config.weights.tag is {tag!r}: its file does not ship with fmlora_jax: {error}, "
        f"or {source.where} and pass --config.weights.path=FILE"
      ) from None
  path = pathlib.Path(__file__).with_name(file.name)
  if not path.is_file():
    raise ConfigError(f"config.weights.tag is {tag!r}: {path.name} is missing; {source.where}")
  return path


def _local(config: WeightsConfig) -> pathlib.Path:
  """Returns the config's path; refuses one that is no file."""
  path = pathlib.Path(str(config.path)).expanduser()
  if path.is_file():
    return path
  fault = f"no such file; {WEIGHTS[config.tag].where}" if config.tag else "no such file"
  if path.is_dir():
    fault = f"a folder; name the file in it, such as {path / 'model.safetensors'}"
  if "://" in str(config.path):
    fault = "must be a local file or gs://BUCKET/FILE; download it and name the copy"
  raise ConfigError(f"config.weights.path is {config.path!r}: {fault}")
