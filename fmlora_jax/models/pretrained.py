"""Pre-trained weights: which there are, and how a file on disk becomes the parameters of our ViT.

A tag names one published checkpoint: "ViT-B/16" alone has stood for three networks in timm's time.
Files are read with safetensors, never with pickle. A new checkpoint is one entry of `WEIGHTS`, a
new kind of file one entry of `LAYOUTS`.
"""

import dataclasses
import difflib
import hashlib
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import numpy as np
import safetensors
import safetensors.numpy
from absl import logging
from flax import traverse_util
from jaxtyping import Float

from fmlora_jax.config import WeightsConfig
from fmlora_jax.models import vit
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


Rule = tuple[str, str, Callable[[np.ndarray], np.ndarray]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """How a family of files names its tensors.

  Attributes:
    rules: (regex over a whole name on disk, our leaf, change of the array). Each rule that matches
      makes a leaf: three make query, key and value out of one tensor.
    ignored: regexes over names of tensors that are no part of the feature extractor.
  """

  rules: tuple[Rule, ...]
  ignored: tuple[str, ...]

  def leaves(self, name: str) -> list[tuple[str, Callable[[np.ndarray], np.ndarray]]]:
    """Returns (our leaf, change of the array) for each rule that matches the name."""
    matches = ((re.fullmatch(pattern, name), leaf, change) for pattern, leaf, change in self.rules)
    return [(match.expand(leaf), change) for match, leaf, change in matches if match]

  def ignores(self, name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in self.ignored)


def _same(x: np.ndarray) -> np.ndarray:
  return x


def _unbatch(x: np.ndarray) -> np.ndarray:
  return x[0] if x.ndim == 3 and x.shape[0] == 1 else x


def _patches(x: np.ndarray) -> np.ndarray:
  """Convolution weight OIHW -> kernel over flattened patches, rows in the order (p, q, c)."""
  return x.transpose(2, 3, 1, 0).reshape(math.prod(x.shape[1:]), len(x)) if x.ndim == 4 else x


def _dense(name: str, leaf: str, change: Callable[[np.ndarray], np.ndarray] = _same) -> list[Rule]:
  """Rules of a torch Linear; `change` acts on the rows of weight and bias."""
  return [
    (rf"{name}\.weight", f"{leaf}/kernel", lambda x: change(x).T),
    (rf"{name}\.bias", f"{leaf}/bias", change),
  ]


def _norm(name: str, leaf: str) -> list[Rule]:
  return [(rf"{name}\.weight", f"{leaf}/scale", _same), (rf"{name}\.bias", f"{leaf}/bias", _same)]


def _third(part: int) -> Callable[[np.ndarray], np.ndarray]:
  return lambda x: x[part * len(x) // 3 : (part + 1) * len(x) // 3]


def _ours() -> Layout:
  rules = ((r"cls|position|(?:embedding|norm|block_\d+)/.+", r"\g<0>", _same),)
  return Layout(rules=rules, ignored=(r"head/.+",))


def _timm() -> Layout:
  block = r"blocks\.(\d+)\."
  rules = [
    (r"cls_token", "cls", _unbatch),
    (r"pos_embed", "position", _unbatch),
    (r"patch_embed\.proj\.weight", "embedding/kernel", _patches),
    (r"patch_embed\.proj\.bias", "embedding/bias", _same),
    *_norm(rf"{block}norm([12])", r"block_\1/norm\2"),
    *_dense(rf"{block}attn\.qkv", r"block_\1/attention/query/dense", _third(0)),
    *_dense(rf"{block}attn\.qkv", r"block_\1/attention/key/dense", _third(1)),
    *_dense(rf"{block}attn\.qkv", r"block_\1/attention/value/dense", _third(2)),
    *_dense(rf"{block}attn\.proj", r"block_\1/attention/out/dense"),
    *_dense(rf"{block}mlp\.(fc[12])", r"block_\1/\2/dense"),
    (rf"{block}ls([12])\.gamma", r"block_\1/scale\2", _same),
    *_norm("norm", "norm"),
  ]
  return Layout(rules=tuple(rules), ignored=(r"(head|fc_norm|pre_logits)\..+", r"mask_token"))


def _dinov2() -> Layout:
  """Hugging Face's names; those of transformers 5 in memory (q_proj, ..., o_proj) as well."""
  top = r"(?:dinov2\.)?"
  block = rf"{top}encoder\.layer\.(\d+)\."
  rules = [
    (rf"{top}embeddings\.cls_token", "cls", _unbatch),
    (rf"{top}embeddings\.position_embeddings", "position", _unbatch),
    (rf"{top}embeddings\.patch_embeddings\.projection\.weight", "embedding/kernel", _patches),
    (rf"{top}embeddings\.patch_embeddings\.projection\.bias", "embedding/bias", _same),
    *_norm(rf"{block}norm([12])", r"block_\1/norm\2"),
    *_dense(rf"{block}attention\.(?:output\.dense|o_proj)", r"block_\1/attention/out/dense"),
    *_dense(rf"{block}mlp\.(fc[12])", r"block_\1/\2/dense"),
    (rf"{block}layer_scale([12])\.lambda1", r"block_\1/scale\2", _same),
    *_norm(rf"{top}layernorm", "norm"),
  ]
  for name in ("query", "key", "value"):
    disk = rf"{block}attention\.(?:attention\.{name}|{name[0]}_proj)"
    rules += _dense(disk, rf"block_\1/attention/{name}/dense")
  return Layout(rules=tuple(rules), ignored=(rf"{top}embeddings\.mask_token", r"classifier\..+"))


LAYOUTS: Mapping[str, Layout] = {"ours": _ours(), "timm": _timm(), "dinov2": _dinov2()}


def flatten(params: Params) -> dict[str, Any]:
  """Returns {"block_0/norm1/scale": array, ...}."""
  return traverse_util.flatten_dict(params, sep="/")


def unflatten(leaves: Mapping[str, Any]) -> Params:
  """Inverse of `flatten`."""
  return traverse_util.unflatten_dict(leaves, sep="/")


def resize_positions(position: Float[np.ndarray, "..."], grid: int) -> Float[np.ndarray, "..."]:
  """Returns position embeddings for a grid x grid image; the class token's row stays.

  Source: DINOv2 (arXiv:2304.07193) as Hugging Face runs it: bicubic, a = -0.75, no antialiasing.

  Args:
    position: [N, D]: the class token's row, then a square of patches, row by row. An array of
      another form comes back as it is.
  """
  side = math.isqrt(max(len(position) - 1, 0)) if position.ndim == 2 else 0
  if side in (0, grid) or side**2 + 1 != len(position):
    return position
  width = position.shape[1]
  method = jax.image.ResizeMethod.CUBIC_PYTORCH
  patches = position[1:].reshape(side, side, width)
  resized = jax.image.resize(patches, (grid, grid, width), method, antialias=False)
  return np.concatenate([position[:1], np.asarray(resized).reshape(-1, width)])


def convert(
  tensors: Mapping[str, np.ndarray], layout: str, sizes: Sizes, *, cut: bool = False
) -> tuple[Params, tuple[str, ...]]:
  """Returns (params of `vit.make(sizes)` as float32 NumPy arrays, names of the unused tensors).

  Args:
    tensors: name on disk -> array of any float type.
    layout: a name in LAYOUTS.
    cut: leave out the blocks from `sizes.depth` on, instead of refusing them.

  Raises:
    ValueError: naming together all tensors that are missing, unknown or of a wrong shape; or one
      that holds NaN or infinity.
  """
  leaves, ignored, unknown = {}, [], []  # leaf -> (name on disk, array)
  for name, tensor in tensors.items():
    targets = LAYOUTS[layout].leaves(name)
    is_cut = cut and any(_block(leaf) >= sizes.depth for leaf, _ in targets)
    if is_cut or (not targets and LAYOUTS[layout].ignores(name)):
      ignored.append(name)
    elif not targets or targets[0][0] in leaves:
      unknown.append(name)
    else:
      tensor = _float32(name, tensor)
      leaves |= {leaf: (name, change(tensor)) for leaf, change in targets}
  if "position" in leaves:
    name, position = leaves["position"]
    leaves["position"] = name, resize_positions(position, sizes.grid)
  _check(leaves, unknown, layout, sizes, tensors)
  params = {leaf: np.ascontiguousarray(array) for leaf, (_, array) in leaves.items()}
  return unflatten(params), tuple(ignored)


def _block(leaf: str) -> int:
  """Returns i of block_i/...; -1 for other leaves."""
  match = re.match(r"block_(\d+)/", leaf)
  return int(match[1]) if match else -1


def _float32(name: str, tensor: np.ndarray) -> np.ndarray:
  with np.errstate(over="ignore"):  # a float64 too large becomes infinity and is refused here
    tensor = np.atleast_1d(np.asarray(tensor, np.float32))
  if not np.isfinite(tensor).all():
    raise ValueError(f"tensor {name} holds NaN or infinity; the file is damaged, get it again")
  return tensor


def _check(
  leaves: Mapping[str, tuple[str, np.ndarray]],
  unknown: Iterable[str],
  layout: str,
  sizes: Sizes,
  names: Iterable[str],
) -> None:
  """Refuses leaves that are not those of the ViT, all in one message."""
  expected = flatten(jax.eval_shape(vit.make(sizes).init, jax.random.key(0)))
  shapes = {leaf: expected[leaf].shape for leaf in expected}
  surplus = {leaves[leaf][0] for leaf in leaves if leaf not in shapes}
  wrong = [
    f"{name} -> {leaf} {array.shape} instead of {shapes[leaf]}"
    for leaf, (name, array) in leaves.items()
    if leaf in shapes and array.shape != shapes[leaf]
  ]
  faults = {
    "missing": [leaf for leaf in shapes if leaf not in leaves],
    "unknown": [*unknown, *sorted(surplus)],
    "wrong shape": wrong,
  }
  found = [f"{kind} ({len(items)}): {_some(items)}" for kind, items in faults.items() if items]
  if found:
    guess = guess_layout(names)
    hint = f"; its names look like layout {guess!r}" if guess not in (layout, None) else ""
    raise ValueError(
      f"the tensors do not make a ViT of width {sizes.width}, depth {sizes.depth}, patch size "
      f"{sizes.patch_size} in layout {layout!r}: {'; '.join(found)}{hint}"
    )


def _some(items: list[str], most: int = 4) -> str:
  rest = [f"and {len(items) - most} more"] if len(items) > most else []
  return ", ".join(items[:most] + rest)


def guess_layout(names: Iterable[str]) -> str | None:
  """Returns the layout whose rules match most of the names; None if none matches any."""
  names = list(names)
  counts = {key: sum(bool(x.leaves(name)) for name in names) for key, x in LAYOUTS.items()}
  best = max(counts, key=counts.__getitem__)
  return best if counts[best] else None


def load(config: WeightsConfig, image_size: int | None = None) -> tuple[Params, Sizes, Info]:
  """Returns (params as float32 NumPy arrays, sizes of the ViT, what was loaded).

  Args:
    image_size: side in pixels that the ViT will see; positions are interpolated to it. None takes
      the architecture's.

  Raises:
    FileNotFoundError: if there is no file; says where to get it.
    ValueError: if a field of the config or the file can't be used.
  """
  _check_fields(config)
  if config.tag == "random":
    return _draw(config, image_size)
  path = _locate(config)
  shown = config.path or path.name
  tensors, metadata = read(path, shown)
  if config.tag:
    source = WEIGHTS[config.tag]
    mend = f"is it the file of {config.tag!r}? {source.where}"
    own = "; for another file of your own set config.weights.tag='' and config.weights.architecture"
  else:
    source = _describe(config, tensors, metadata, shown)
    mend, own = f"is it a {source.architecture}? --config.weights.architecture=NAME", ""
  digest = sha256(path)
  if source.sha256 not in (None, digest):
    raise ValueError(
      f"{shown} has sha256 {digest}: tag {config.tag!r} is {source.sha256}; {source.where}{own}"
    )
  sizes = _sizes(config, source, image_size)
  try:
    params, ignored = convert(tensors, source.layout, sizes, cut=config.depth is not None)
  except ValueError as error:
    raise ValueError(f"{shown}: {error}; {mend}{own}") from None
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
    raise ValueError(f"config.weights.tag is {config.tag!r}: must be one of {list(WEIGHTS)}{hint}")
  if config.tag == "random" and config.path is not None:
    raise ValueError(
      f"config.weights.path is {config.path!r}: tag 'random' reads no file; name the file's tag or "
      "leave the path out"
    )
  if not config.tag and config.path is None:
    raise ValueError(
      "config.weights.tag is '': must be a tag, or config.weights.path must name a file"
    )
  fixed = config.tag and WEIGHTS[config.tag].architecture
  if fixed and config.architecture not in (None, fixed):
    raise ValueError(
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
    raise ValueError(
      f"config.weights.architecture is {name!r}: must be one of {sorted(vit.ARCHITECTURES)}"
    )
  full = vit.architecture(name)
  depth = full.depth if config.depth is None else config.depth
  if not 1 <= depth <= full.depth:
    raise ValueError(f"config.weights.depth is {depth}: must be in 1..{full.depth} for a {name}")
  image_size = full.image_size if image_size is None else image_size
  p = full.patch_size
  if image_size < p or image_size % p:
    near = max(p, round(image_size / p) * p)
    raise ValueError(
      f"config.input.image_size is {image_size}: must be a multiple of the patch size {p} of a "
      f"{name}, such as {near}"
    )
  return dataclasses.replace(full, image_size=image_size, depth=depth, gelu=source.gelu)


def _describe(
  config: WeightsConfig, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], shown: str
) -> Source:
  """Returns what is known of a file without a tag: from its metadata, its names and the config."""
  layout = guess_layout(tensors)
  if layout is None:
    raise ValueError(f"{shown}: no tensor has a name as in one of the layouts {list(LAYOUTS)}")
  architecture = config.architecture or metadata.get("architecture")
  if architecture is None:
    raise ValueError(
      f"config.weights.architecture is not set, and {shown} does not name its own: must be one of "
      f"{sorted(vit.ARCHITECTURES)}"
    )
  normalisation, gelu = metadata.get("normalisation"), metadata.get("gelu", "erf")
  if normalisation not in (None, "half", "zero_one", "imagenet") or gelu not in ("erf", "tanh"):
    raise ValueError(
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
      raise ValueError(
        f"config.weights.path is {config.path!r}: a folder; name the file in it, such as "
        f"{path / 'model.safetensors'}"
      )
    if not path.is_file():
      raise FileNotFoundError(
        f"config.weights.path is {config.path!r}: no such file" + (f"; {where}" if where else "")
      )
    return path
  source = WEIGHTS[config.tag]
  path = pathlib.Path(__file__).with_name(source.file)
  if source.shipped and path.is_file():
    return path
  if source.shipped:
    raise FileNotFoundError(f"config.weights.tag is {config.tag!r}: {path.name} is gone; {where}")
  raise FileNotFoundError(
    f"config.weights.tag is {config.tag!r}: its file is not part of fmlora_jax; {where} and say "
    "--config.weights.path=FILE"
  )


_DTYPES = ("F16", "BF16", "F32", "F64")

# what people take for a safetensors file, by its first bytes
_MISTAKES = (
  (b"version https://git-lfs", "a Git LFS pointer, not the file itself: run git lfs pull"),
  (b"<", "a web page: download the file itself"),
  (b"\x80", "a Python pickle, which is never opened: take the model.safetensors of that model"),
  (b"PK", "a zip (PyTorch or .npz): take the model.safetensors of that model"),
)


def read(path: pathlib.Path, shown: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Returns (name -> array, metadata) of a safetensors file; `shown` stands for it in errors.

  Raises:
    ValueError: if it is not one, is cut off, or holds quantised or integer tensors.
  """
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      names = file.keys()
      for name in names:
        dtype = file.get_slice(name).get_dtype()
        if dtype not in _DTYPES:
          raise ValueError(
            f"{shown}: tensor {name} is {dtype}: must be one of {', '.join(_DTYPES)}; take the "
            "file that is not quantised"
          )
      return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
  except OSError as error:
    raise ValueError(f"{shown} can't be read: {error.strerror or error}") from None
  except safetensors.SafetensorError as error:
    reason = f"damaged or cut off ({error}): get it again"
    with open(path, "rb") as file:
      head = file.read(64)
    if not head:
      reason = "empty: get it again"
    for start, mistake in _MISTAKES:
      if head.startswith(start) and b'{"' not in head[:10]:
        reason = mistake
    raise ValueError(f"{shown} is not a whole safetensors file: it is {reason}") from None


def sha256(path: pathlib.Path) -> str:
  """Returns the file's hex digest; reads it in pieces."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def save(params: Params, path: str | os.PathLike, metadata: Mapping[str, str]) -> None:
  """Writes params in layout "ours", each leaf in its own dtype; whole or not at all.

  Args:
    metadata: architecture, normalisation and, if not "erf", gelu: then the file loads without a
      tag. Other entries are kept for people.
  """
  path = pathlib.Path(path)
  # safetensors writes the memory of an array as it lies, also of a transposed one
  leaves = {name: np.ascontiguousarray(leaf) for name, leaf in flatten(params).items()}
  part = path.with_name(path.name + ".part")
  safetensors.numpy.save_file(leaves, part, metadata=dict(metadata))
  os.replace(part, path)
