"""Layouts of weight files: the names of their tensors, and their conversion to our parameters.

A new kind of file is one entry of `LAYOUTS`: regexes over names, and small changes of arrays.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jaxtyping import Float

from fmlora_jax.models import vit
from fmlora_jax.types import Params, Sizes

Rule = tuple[str, str, Callable[[np.ndarray], np.ndarray]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """Names of the tensors in a family of files.

  Attributes:
    rules: (regex over a whole name on disk, our leaf, change of the array). Each matching rule
      makes a leaf; three rules make query, key and value out of one tensor.
    ignored: regexes over the names of tensors outside of the feature extractor.
    antialias: of the interpolation of positions, as in the library of these files; see
      `resize_positions`.
    epsilon: of each LayerNorm, as in that library.
  """

  rules: tuple[Rule, ...]
  ignored: tuple[str, ...]
  antialias: bool = False
  epsilon: float = 1e-6

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


def _class_row(x: np.ndarray) -> np.ndarray:
  """Adds a row of zeros for a class token without a position, as in newer big_vision."""
  x = _unbatch(x)
  is_square = x.ndim == 2 and math.isqrt(len(x)) ** 2 == len(x)
  return np.concatenate([np.zeros_like(x[:1]), x]) if is_square else x


def _rows(x: np.ndarray) -> np.ndarray:
  """Returns a convolution kernel HWIO as a kernel over flattened patches, rows (p, q, c)."""
  return x.reshape(-1, x.shape[-1]) if x.ndim == 4 and x.size else x


def _patches(x: np.ndarray) -> np.ndarray:
  """Returns a convolution weight OIHW as a kernel over flattened patches, rows (p, q, c)."""
  return x.transpose(2, 3, 1, 0).reshape(math.prod(x.shape[1:]), len(x)) if x.ndim == 4 else x


def _dense(name: str, leaf: str, change: Callable[[np.ndarray], np.ndarray] = _same) -> list[Rule]:
  """Returns the rules of a torch Linear; `change` acts on the rows of weight and bias."""
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
  ignored = (r"(head|pre_logits)\..+", r"mask_token")
  return Layout(rules=tuple(rules), ignored=ignored, antialias=True)


def _transformers(top: str) -> tuple[str, list[Rule]]:
  """Returns a regex of a block, and the rules that Hugging Face's ViTs have in common.

  Also with the names of transformers 5 in memory (layers, q_proj, ..., o_proj, fc1, fc2).
  """
  block = rf"{top}(?:encoder\.layer|layers)\.(\d+)\."
  rules = [
    (rf"{top}embeddings\.cls_token", "cls", _unbatch),
    (rf"{top}embeddings\.position_embeddings", "position", _unbatch),
    (rf"{top}embeddings\.patch_embeddings\.projection\.weight", "embedding/kernel", _patches),
    (rf"{top}embeddings\.patch_embeddings\.projection\.bias", "embedding/bias", _same),
    *_dense(rf"{block}attention\.(?:output\.dense|o_proj)", r"block_\1/attention/out/dense"),
    *_dense(rf"{block}mlp\.(fc[12])", r"block_\1/\2/dense"),
    *_norm(rf"{top}layernorm", "norm"),
  ]
  for name in ("query", "key", "value"):
    disk = rf"{block}attention\.(?:attention\.{name}|{name[0]}_proj)"
    rules += _dense(disk, rf"block_\1/attention/{name}/dense")
  return block, rules


def _dinov2() -> Layout:
  top = r"(?:dinov2\.)?"
  block, rules = _transformers(top)
  rules += [
    *_norm(rf"{block}norm([12])", r"block_\1/norm\2"),
    (rf"{block}layer_scale([12])\.lambda1", r"block_\1/scale\2", _same),
  ]
  return Layout(rules=tuple(rules), ignored=(rf"{top}embeddings\.mask_token", r"classifier\..+"))


def _hf_vit() -> Layout:
  """Returns the layout of ViT, ViT-MAE, ViT-MSN and of DeiT without a distillation token."""
  top = r"(?:(?:vit|deit)\.)?"
  block, rules = _transformers(top)
  rules += [
    *_norm(rf"{block}layernorm_before", r"block_\1/norm1"),
    *_norm(rf"{block}layernorm_after", r"block_\1/norm2"),
    *_dense(rf"{block}intermediate\.dense", r"block_\1/fc1/dense"),
    *_dense(rf"{block}output\.dense", r"block_\1/fc2/dense"),
  ]
  ignored = (rf"{top}embeddings\.mask_token", rf"{top}pooler\..+", r"(classifier|decoder)\..+")
  return Layout(rules=tuple(rules), ignored=ignored, epsilon=1e-12)


def _google() -> Layout:
  """Returns the layout of Google's .npz files, from before flax.linen, since, and big_vision's."""
  top = r"(?:params/)?"
  block = rf"{top}Transformer/encoderblock_(\d+)/"
  attention = rf"{block}MultiHeadDotProductAttention_[01]/(query|key|value|out)"
  rules = (
    (rf"{top}cls", "cls", _unbatch),
    (rf"{top}(?:Transformer/(?:posembed_input/)?)?pos_embedding", "position", _class_row),
    (rf"{top}embedding/kernel", "embedding/kernel", _rows),
    (rf"{top}embedding/bias", "embedding/bias", _same),
    (rf"{block}LayerNorm_0/(scale|bias)", r"block_\1/norm1/\2", _same),
    (rf"{attention}/(kernel|bias)", r"block_\1/attention/\2/dense/\3", _same),
    (rf"{block}LayerNorm_[12]/(scale|bias)", r"block_\1/norm2/\2", _same),
    (rf"{block}MlpBlock_[03]/Dense_0/(kernel|bias)", r"block_\1/fc1/dense/\2", _same),
    (rf"{block}MlpBlock_[03]/Dense_1/(kernel|bias)", r"block_\1/fc2/dense/\2", _same),
    (rf"{top}Transformer/encoder_norm/(scale|bias)", r"norm/\1", _same),
  )
  # antialias as in timm: all files of a checkpoint must give the same features
  return Layout(rules=rules, ignored=(rf"{top}(?:head|pre_logits)/.+",), antialias=True)


LAYOUTS: Mapping[str, Layout] = {
  "ours": _ours(),
  "timm": _timm(),
  "dinov2": _dinov2(),
  "hf_vit": _hf_vit(),
  "google": _google(),
}


def flatten(params: Params) -> dict[str, Any]:
  """Returns {"block_0/norm1/scale": array, ...}."""
  return traverse_util.flatten_dict(params, sep="/")


def unflatten(leaves: Mapping[str, Any]) -> Params:
  """Inverse of `flatten`."""
  return traverse_util.unflatten_dict(leaves, sep="/")


def resize_positions(
  position: Float[np.ndarray, "..."], grid: int, *, antialias: bool = False
) -> Float[np.ndarray, "..."]:
  """Returns position embeddings for grid x grid patches; the class token's row stays.

  Source: torch's bicubic interpolation, as called by timm (antialias, then a = -0.5) and by Hugging
  Face's DINOv2 (none, a = -0.75).

  Args:
    position: [N, D]: the class token's row, then a square of patches, row by row. An array of
      another form is returned unchanged.
    antialias: averages over more positions where the grid shrinks.
  """
  side = math.isqrt(max(len(position) - 1, 0)) if position.ndim == 2 else 0
  if side in (0, grid) or side**2 + 1 != len(position):
    return position
  width = position.shape[1]
  methods = jax.image.ResizeMethod
  method = methods.CUBIC if antialias else methods.CUBIC_PYTORCH
  patches = position[1:].reshape(side, side, width)
  resized = jax.image.resize(patches, (grid, grid, width), method, antialias=antialias)
  return np.concatenate([position[:1], np.asarray(resized).reshape(-1, width)])


def convert(
  tensors: Mapping[str, np.ndarray], layout: str, sizes: Sizes, *, truncate: bool = False
) -> tuple[Params, tuple[str, ...]]:
  """Returns (params of `vit.make_vit(sizes)` as float32 NumPy arrays, names of unused tensors).

  Args:
    tensors: name on disk -> array of any float type.
    layout: a name in LAYOUTS.
    truncate: leave out the blocks from `sizes.depth` on, instead of refusing them.

  Raises:
    ValueError: naming together all tensors that are missing, unknown or of a wrong shape; or one
      that holds NaN or infinity; or if all hold 0.
  """
  tensors = _unstack(tensors)
  leaves, ignored, unknown = {}, [], []  # leaf -> (name on disk, array)
  for name, tensor in tensors.items():
    targets = LAYOUTS[layout].leaves(name)
    is_left_out = truncate and any(_block(leaf) >= sizes.depth for leaf, _ in targets)
    if is_left_out or (not targets and LAYOUTS[layout].ignores(name)):
      ignored.append(name)
    elif not targets or targets[0][0] in leaves:
      unknown.append(name)
    else:
      tensor = _float32(name, tensor)
      leaves |= {leaf: (name, _join(leaf, change(tensor), sizes)) for leaf, change in targets}
  if "position" in leaves:
    name, position = leaves["position"]
    antialias = LAYOUTS[layout].antialias
    leaves["position"] = name, resize_positions(position, sizes.grid, antialias=antialias)
  _check(leaves, unknown, layout, sizes, tensors)
  params = {leaf: np.ascontiguousarray(array) for leaf, (_, array) in leaves.items()}
  if not any(array.any() for array in params.values()):
    raise ValueError("all its tensors are 0: the file is damaged; get it again")
  return unflatten(params), tuple(ignored)


def _unstack(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns single blocks in place of those that big_vision stacks along a first axis."""
  single = {}
  for name, tensor in tensors.items():
    if "/encoderblock/" in name and tensor.ndim:
      for layer, block in enumerate(tensor):
        single[name.replace("/encoderblock/", f"/encoderblock_{layer}/")] = np.asarray(block)
    else:
      single[name] = tensor
  return single


def _join(leaf: str, x: np.ndarray, sizes: Sizes) -> np.ndarray:
  """Merges the axes (heads, width of a head) of a projection, if it has them, into one."""
  heads = (sizes.num_heads, sizes.width // sizes.num_heads)
  for axis in range(x.ndim - 1 if "/attention/" in leaf else 0):
    if x.shape[axis : axis + 2] == heads:
      return x.reshape(*x.shape[:axis], sizes.width, *x.shape[axis + 2 :])
  return x


def _block(leaf: str) -> int:
  """Returns i of block_i/...; -1 for other leaves."""
  match = re.match(r"block_(\d+)/", leaf)
  return int(match[1]) if match else -1


def _float32(name: str, tensor: np.ndarray) -> np.ndarray:
  with np.errstate(over="ignore"):  # too large a float64 becomes infinity and is refused here
    tensor = np.atleast_1d(np.asarray(tensor, np.float32))
  if not np.isfinite(tensor).all():
    raise ValueError(f"tensor {name} holds NaN or infinity: the file is damaged; get it again")
  return tensor


_DISTILLED = re.compile(r".*\bdist(?:illation)?_token")

# the norm after timm's average pooling; big_vision's pooling by attention
_POOLING = re.compile(r"fc_norm\..+|(?:params/)?MAPHead_0/.+")


def _check(
  leaves: Mapping[str, tuple[str, np.ndarray]],
  unknown: Iterable[str],
  layout: str,
  sizes: Sizes,
  names: Collection[str],
) -> None:
  """Refuses leaves that do not fit the ViT, all in one message."""
  expected = flatten(jax.eval_shape(vit.make_vit(sizes).init, jax.random.key(0)))
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
  shown = [f"{kind} ({len(items)}): {_some(items)}" for kind, items in faults.items() if items]
  if shown:
    guess, hint = guess_layout(names), ""
    if guess not in (layout, None):
      hint = f"; its names look like layout {guess!r}"
    elif any(map(_DISTILLED.fullmatch, names)):
      hint = "; it has a distillation token: use the DeiT without one"
    elif "cls" in faults["missing"] or any(map(_POOLING.fullmatch, names)):
      hint = "; it seems to pool its patches; only ViTs with a class-token feature are supported"
    raise ValueError(
      f"the tensors do not make a ViT of width {sizes.width}, depth {sizes.depth}, patch size "
      f"{sizes.patch_size} in layout {layout!r}: {'; '.join(shown)}{hint}"
    )


def _some(items: list[str], most: int = 4) -> str:
  rest = [f"and {len(items) - most} more"] if len(items) > most else []
  return ", ".join(items[:most] + rest)


def guess_layout(names: Iterable[str]) -> str | None:
  """Returns the layout whose rules match most names; None if no rule matches."""
  names = list(names)
  counts = {key: sum(bool(x.leaves(name)) for name in names) for key, x in LAYOUTS.items()}
  best = max(counts, key=counts.__getitem__)
  return best if counts[best] else None
