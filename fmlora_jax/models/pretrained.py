"""Pre-trained weights: which there are, and how a file on disk becomes the parameters of our ViT.

A tag names one published checkpoint: "ViT-B/16" alone has stood for three networks in timm's time.
Pickles are never opened. A new checkpoint is one entry of `WEIGHTS`, a new kind of file one entry
of `layouts.LAYOUTS`.
"""

import dataclasses
import difflib
import pathlib
from collections.abc import Mapping
from typing import Literal

import jax
import numpy as np
from absl import logging

from fmlora_jax.config import ConfigError, WeightsConfig
from fmlora_jax.models import layouts, vit, weight_files
from fmlora_jax.types import Params, Sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
  """One checkpoint.

  Attributes:
    architecture: a name in vit.ARCHITECTURES; None where the config names it.
    layout: how the file names and lays out its tensors, a name in LAYOUTS.
    normalisation: of the pixels the network was trained with; None if unknown.
    where: for people: how to get the file.
    file: its name; None if there is none. A shipped one lies beside this module.
    sha256: of the file; None accepts any.
  """

  architecture: str | None
  layout: str
  normalisation: Literal["half", "zero_one", "imagenet"] | None
  where: str
  file: str | None = "model.safetensors"
  gelu: Literal["erf", "tanh"] = "erf"
  shipped: bool = False
  sha256: str | None = None


def _hub(repository: str) -> str:
  return f"get it from the Hugging Face Hub (hf download {repository} model.safetensors)"


WEIGHTS: Mapping[str, Source] = {
  "micro_letters": Source(
    architecture="micro",
    layout="ours",
    normalisation="half",
    where="it ships with fmlora_jax: install the package again",
    file="micro_letters.safetensors",
    shipped=True,
    sha256="ab2e660863447f4836d6fb0c8fac4ae6028fca142fe995f6af1b6e17f5795d4d",
  ),
  "dinov2_small": Source(
    architecture="dinov2_s14",
    layout="dinov2",
    normalisation="imagenet",
    where=_hub("facebook/dinov2-small"),
  ),
  "dinov2_base": Source(
    architecture="dinov2_b14",
    layout="dinov2",
    normalisation="imagenet",
    where=_hub("facebook/dinov2-base"),
  ),
  "augreg2_in21k_ft_in1k": Source(
    architecture="vit_b16",
    layout="timm",
    normalisation="half",
    where=_hub("timm/vit_base_patch16_224.augreg2_in21k_ft_in1k"),
  ),
  "random": Source(
    architecture=None,
    layout="ours",
    normalisation="half",
    where="drawn from seed 0, for tests and benchmarks",
    file=None,
  ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Info:
  """What was loaded, for the log, the checkpoint and result.json.

  Attributes:
    tag: as in the config; "file" where it names none.
    file: the file's name without its folder; None for random weights.
    sha256: of the file; None for random weights.
    normalisation: what the network was trained with; None if the file does not say, then
      config.input.normalisation must.
    ignored: tensors of the file that were not used, by their names on disk.
  """

  tag: str
  file: str | None
  sha256: str | None
  normalisation: str | None
  ignored: tuple[str, ...] = ()


def load(config: WeightsConfig, image_size: int | None = None) -> tuple[Params, Sizes, Info]:
  """Returns (params as float32 NumPy arrays, sizes of the ViT, what was loaded).

  Args:
    image_size: side in pixels that the ViT will see; positions are interpolated to it. None takes
      the architecture's.

  Raises:
    ConfigError: if there is no file, with where to get it; if a field or the file can't be used.
  """
  _check_fields(config)
  if config.tag == "random":
    return _draw(config, image_size)
  path = _locate(config)
  shown = config.path or path.name
  tensors, metadata = weight_files.read(path, shown)
  if config.tag:
    source = WEIGHTS[config.tag]
    mend = f"is it the file of {config.tag!r}? {source.where}"
    own = "; for another file of your own set config.weights.tag='' and config.weights.architecture"
  else:
    source = _describe(config, tensors, metadata, shown)
    mend, own = f"is it a {source.architecture}? --config.weights.architecture=NAME", ""
  digest = weight_files.sha256(path)
  if source.sha256 not in (None, digest):
    raise ConfigError(
      f"{shown} has sha256 {digest}: tag {config.tag!r} is {source.sha256}; {source.where}{own}"
    )
  sizes = _sizes(config, source, image_size)
  try:
    params, ignored = layouts.convert(tensors, source.layout, sizes, cut=config.depth is not None)
  except ValueError as error:
    raise ConfigError(f"{shown}: {error}; {mend}{own}") from None
  logging.info("weights %s: %s, sha256 %s", config.tag or "file", path.name, digest)
  if ignored:
    logging.info("weights: %d tensors ignored: %s", len(ignored), ", ".join(ignored))
  info = Info(
    tag=config.tag or "file",
    file=path.name,
    sha256=digest,
    normalisation=source.normalisation,
    ignored=ignored,
  )
  return params, sizes, info


def _check_fields(config: WeightsConfig) -> None:
  """Refuses an unknown tag, and fields that the tag does not take."""
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
      "leave it out, or take tag 'random'"
    )


def _draw(config: WeightsConfig, image_size: int | None) -> tuple[Params, Sizes, Info]:
  source = WEIGHTS["random"]
  sizes = _sizes(config, source, image_size)
  params = jax.jit(vit.make(sizes).init)(jax.random.key(0))
  info = Info(tag="random", file=None, sha256=None, normalisation=source.normalisation)
  return jax.device_get(params), sizes, info


def _sizes(config: WeightsConfig, source: Source, image_size: int | None) -> Sizes:
  """Returns the sizes of the architecture at this image size, cut to the config's depth."""
  name = source.architecture or config.architecture
  if name not in vit.ARCHITECTURES:
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
  return dataclasses.replace(full, image_size=image_size, depth=depth, gelu=source.gelu)


def _describe(
  config: WeightsConfig, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], shown: str
) -> Source:
  """Returns what is known of a file without a tag: from its metadata, its names and the config."""
  layout = layouts.guess_layout(tensors)
  if layout is None:
    known = list(layouts.LAYOUTS)
    raise ConfigError(f"{shown}: no tensor has a name as in one of the layouts {known}")
  architecture = config.architecture or metadata.get("architecture")
  if architecture is None:
    raise ConfigError(
      f"config.weights.architecture is not set, and {shown} does not name its own: must be one of "
      f"{sorted(vit.ARCHITECTURES)}"
    )
  normalisation, gelu = metadata.get("normalisation"), metadata.get("gelu", "erf")
  if normalisation not in (None, "half", "zero_one", "imagenet") or gelu not in ("erf", "tanh"):
    raise ConfigError(
      f"{shown}: its metadata say normalisation {normalisation!r}, gelu {gelu!r}: must be one of "
      "half, zero_one, imagenet and one of erf, tanh"
    )
  return Source(
    architecture=architecture, layout=layout, normalisation=normalisation, gelu=gelu, where=""
  )


def _locate(config: WeightsConfig) -> pathlib.Path:
  """Returns the file; refuses a path that is not there or is a folder."""
  where = WEIGHTS[config.tag].where if config.tag else ""
  if config.path is not None:
    path = pathlib.Path(config.path).expanduser()
    if path.is_dir():
      raise ConfigError(
        f"config.weights.path is {config.path!r}: a folder; name the file in it, such as "
        f"{path / 'model.safetensors'}"
      )
    if not path.is_file():
      raise ConfigError(
        f"config.weights.path is {config.path!r}: no such file" + (f"; {where}" if where else "")
      )
    return path
  source = WEIGHTS[config.tag]
  path = pathlib.Path(__file__).with_name(source.file)
  if source.shipped and path.is_file():
    return path
  if source.shipped:
    raise ConfigError(f"config.weights.tag is {config.tag!r}: {path.name} is gone; {where}")
  raise ConfigError(
    f"config.weights.tag is {config.tag!r}: its file is not part of fmlora_jax; {where} and say "
    "--config.weights.path=FILE"
  )
