"""The published checkpoints, by the tag of `config.weights`: their files and how they are read."""

import dataclasses
from collections.abc import Mapping
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointFile:
  """One published file: on the Hugging Face Hub, in a bucket, or next to this module.

  Attributes:
    layout: of its tensors, a name in LAYOUTS.
    repository, revision: on the Hub; without a revision the newest.
    bucket: bucket and folder on Google Cloud Storage.
    sha256: of the file; None accepts any.
  """

  layout: str
  name: str = "model.safetensors"
  repository: str | None = None
  revision: str | None = None
  bucket: str | None = None
  sha256: str | None = None

  @property
  def command(self) -> str | None:
    """The shell command that downloads it; None if it ships with the package."""
    if self.repository:
      revision = f" --revision {self.revision}" if self.revision else ""
      return f"hf download {self.repository} {self.name}{revision}"
    if self.bucket:
      return f"curl -LO https://storage.googleapis.com/{self.bucket}/{self.name}"
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
  """One published checkpoint.

  Attributes:
    files: that hold it, with equal contents; the first can be downloaded.
    architecture: a name in vit.ARCHITECTURES; None where the config names it.
    normalisation: of pixels in training; None if unknown.
    gelu: "erf" as in timm and Hugging Face, also for networks that Google trained with "tanh".
  """

  files: tuple[CheckpointFile, ...]
  architecture: str | None
  normalisation: Literal["half", "zero_one", "imagenet"] | None
  gelu: Literal["erf", "tanh"] = "erf"

  @property
  def where(self) -> str:
    """Advice on how to get one of its files."""
    commands = [f"`{file.command}`" for file in self.files if file.command]
    if not commands:
      return "reinstall fmlora_jax, which ships it"
    return f"run {' or '.join(commands)}"


def _timm(name: str, revision: str | None = None, sha256: str | None = None) -> CheckpointFile:
  repository = f"timm/vit_{name}"
  return CheckpointFile(layout="timm", repository=repository, revision=revision, sha256=sha256)


def _google(name: str) -> CheckpointFile:
  folder, _, name = f"vit_models/{name}.npz".rpartition("/")
  return CheckpointFile(layout="google", bucket=folder, name=name)


def _supervised(architecture: str, *files: CheckpointFile) -> Checkpoint:
  """Returns a checkpoint that Google trained with labels, on pixels in [-1, 1]."""
  return Checkpoint(files=files, architecture=architecture, normalisation="half")


def _dinov2(architecture: str, size: str, revision: str, sha256: str) -> Checkpoint:
  file = CheckpointFile(
    layout="dinov2", repository=f"facebook/dinov2-{size}", revision=revision, sha256=sha256
  )
  return Checkpoint(files=(file,), architecture=architecture, normalisation="imagenet")


# names of the augmentation and regularisation of "How to train your ViT" (arXiv:2106.10270)
_BASE = "augreg/B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0"
_SMALL = "augreg/S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0"
_TINY = "augreg/Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0"

WEIGHTS: Mapping[str, Checkpoint] = {
  "micro_letters": Checkpoint(
    files=(
      CheckpointFile(
        layout="ours",
        name="micro_letters.safetensors",
        sha256="ab2e660863447f4836d6fb0c8fac4ae6028fca142fe995f6af1b6e17f5795d4d",
      ),
    ),
    architecture="micro",
    normalisation="half",
  ),
  "augreg2_in21k_ft_in1k": _supervised(
    "vit_b16",
    _timm(
      "base_patch16_224.augreg2_in21k_ft_in1k",
      revision="063c6c38a5d8510b2e57df480445e94b231dad2c",
      sha256="32aa17d6e17b43500f531d5f6dc9bc93e56ed8841b8a75682e1bb295d722405b",
    ),
  ),
  "augreg_in21k_ft_in1k": _supervised(
    "vit_b16",
    _timm("base_patch16_224.augreg_in21k_ft_in1k"),
    _google(f"{_BASE}--imagenet2012-steps_20k-lr_0.01-res_224"),
  ),
  "augreg_in21k": _supervised("vit_b16", _timm("base_patch16_224.augreg_in21k"), _google(_BASE)),
  "orig_in21k": _supervised(
    "vit_b16", _timm("base_patch16_224.orig_in21k"), _google("imagenet21k/ViT-B_16")
  ),
  "augreg_in21k_ft_in1k_s16": _supervised(
    "vit_s16",
    _timm(
      "small_patch16_224.augreg_in21k_ft_in1k",
      revision="7e2c55630205e1266030f18370f4c6ed1a514b52",
      sha256="79c03c635cdfd798a364a9d8c4e5c0b7255b975ea2c9616046d4f77ab01435aa",
    ),
    _google(f"{_SMALL}--imagenet2012-steps_20k-lr_0.03-res_224"),
  ),
  "augreg_in21k_s16": _supervised(
    "vit_s16", _timm("small_patch16_224.augreg_in21k"), _google(_SMALL)
  ),
  "augreg_in21k_ft_in1k_ti16": _supervised(
    "vit_ti16",
    _timm(
      "tiny_patch16_224.augreg_in21k_ft_in1k",
      revision="7d3afdd0cf93ad84d986eb2d6bcc5812ebd0b106",
      sha256="fecf81b492bd13ee7a5297cb74d1d417aac8bf7e1b7d96aed89c4691984587ed",
    ),
    _google(f"{_TINY}--imagenet2012-steps_20k-lr_0.03-res_224"),
  ),
  "augreg_in21k_ti16": _supervised(
    "vit_ti16", _timm("tiny_patch16_224.augreg_in21k"), _google(_TINY)
  ),
  "dino": Checkpoint(
    files=(_timm("base_patch16_224.dino"),), architecture="vit_b16", normalisation="imagenet"
  ),
  "dinov2_small": _dinov2(
    "dinov2_s14",
    "small",
    revision="ed25f3a31f01632728cabb09d1542f84ab7b0056",
    sha256="ae1e99fcefd534ed978cdeb8326f08030c96e28b7a81ffcbc98a857c84d14be1",
  ),
  "dinov2_base": _dinov2(
    "dinov2_b14",
    "base",
    revision="f9e44c814b77203eaa57a6bdbbd535f21ede1415",
    sha256="d73036b56966966d07975d696bde331762f37297e2f095de8cea0040c3aa0841",
  ),
  "random": Checkpoint(files=(), architecture=None, normalisation="half"),  # for benchmarks
}
