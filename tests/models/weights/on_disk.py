"""The same small random ViT as timm, Hugging Face, Google and big_vision would write it to disk."""

import functools
import pathlib

import jax
import numpy as np
import safetensors.numpy

from fmlora_jax.models import vit
from fmlora_jax.types import Sizes

TINY = Sizes(image_size=16, patch_size=4, width=12, depth=3, num_heads=2)
TINY_SCALED = Sizes(image_size=16, patch_size=4, width=12, depth=3, num_heads=2, layer_scale=True)


def write(path: pathlib.Path, tensors: dict) -> str:
  tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
  safetensors.numpy.save_file(tensors, path)
  return str(path)


def write_npz(path: pathlib.Path, tensors: dict) -> str:
  with open(path, "wb") as file:  # a name would get the ending .npz
    np.savez(file, **tensors)
  return str(path)


def assert_equal(ours: dict, reference: dict) -> None:
  assert jax.tree.structure(ours) == jax.tree.structure(reference)
  jax.tree.map(np.testing.assert_array_equal, ours, reference)
  assert {leaf.dtype for leaf in jax.tree.leaves(ours)} == {np.dtype(np.float32)}


def random_params(sizes: Sizes, scale: float = 1.0) -> dict:
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: np.float32(scale) * rng.standard_normal(leaf.shape, np.float32), _shapes(sizes)
  )


@functools.cache
def _shapes(sizes: Sizes) -> dict:
  return jax.eval_shape(vit.make_vit(sizes).init, jax.random.key(0))


def _dense(disk: dict, name: str, layer: dict) -> None:
  disk[f"{name}.weight"] = np.ascontiguousarray(layer["dense"]["kernel"].T)
  disk[f"{name}.bias"] = layer["dense"]["bias"]


def _norm(disk: dict, name: str, layer: dict) -> None:
  disk[f"{name}.weight"], disk[f"{name}.bias"] = layer["scale"], layer["bias"]


def _patches(disk: dict, name: str, params: dict, p: int) -> None:
  kernel = params["embedding"]["kernel"].reshape(p, p, 3, -1).transpose(3, 2, 0, 1)
  disk[f"{name}.weight"] = np.ascontiguousarray(kernel)
  disk[f"{name}.bias"] = params["embedding"]["bias"]


def to_timm(params: dict, sizes: Sizes) -> dict:
  """Returns what timm would write."""
  disk = {"cls_token": params["cls"][None], "pos_embed": params["position"][None]}
  _patches(disk, "patch_embed.proj", params, sizes.patch_size)
  for layer in range(sizes.depth):
    block, name = params[f"block_{layer}"], f"blocks.{layer}"
    qkv = [block["attention"][key]["dense"] for key in ("query", "key", "value")]
    disk[f"{name}.attn.qkv.weight"] = np.concatenate([x["kernel"].T for x in qkv])
    disk[f"{name}.attn.qkv.bias"] = np.concatenate([x["bias"] for x in qkv])
    _dense(disk, f"{name}.attn.proj", block["attention"]["out"])
    for part in ("1", "2"):
      _norm(disk, f"{name}.norm{part}", block[f"norm{part}"])
      _dense(disk, f"{name}.mlp.fc{part}", block[f"fc{part}"])
      if sizes.layer_scale:
        disk[f"{name}.ls{part}.gamma"] = block[f"scale{part}"]
  _norm(disk, "norm", params["norm"])
  return disk | {"head.weight": np.ones((5, sizes.width), np.float32)}


def to_dinov2(params: dict, sizes: Sizes, new_names: bool = False) -> dict:
  """Returns what Hugging Face would write; with `new_names` as transformers 5 names attention."""
  disk = {
    "embeddings.cls_token": params["cls"][None],
    "embeddings.mask_token": params["cls"],
    "embeddings.position_embeddings": params["position"][None],
  }
  _patches(disk, "embeddings.patch_embeddings.projection", params, sizes.patch_size)
  for layer in range(sizes.depth):
    block, name = params[f"block_{layer}"], f"encoder.layer.{layer}"
    for key in ("query", "key", "value"):
      place = f"{key[0]}_proj" if new_names else f"attention.{key}"
      _dense(disk, f"{name}.attention.{place}", block["attention"][key])
    place = "o_proj" if new_names else "output.dense"
    _dense(disk, f"{name}.attention.{place}", block["attention"]["out"])
    for part in ("1", "2"):
      _norm(disk, f"{name}.norm{part}", block[f"norm{part}"])
      _dense(disk, f"{name}.mlp.fc{part}", block[f"fc{part}"])
      disk[f"{name}.layer_scale{part}.lambda1"] = block[f"scale{part}"]
  _norm(disk, "layernorm", params["norm"])
  return disk


def to_hf_vit(params: dict, sizes: Sizes, in_memory: bool = False) -> dict:
  """Returns what Hugging Face would write, or its names in the memory of transformers 5."""
  disk = {
    "embeddings.cls_token": params["cls"][None],
    "embeddings.position_embeddings": params["position"][None],
  }
  _patches(disk, "embeddings.patch_embeddings.projection", params, sizes.patch_size)
  dense = {"out": "attention.output.dense", "fc1": "intermediate.dense", "fc2": "output.dense"}
  dense |= {key: f"attention.attention.{key}" for key in ("query", "key", "value")}
  if in_memory:
    dense = {key: f"attention.{key[0]}_proj" for key in ("query", "key", "value", "out")}
    dense |= {"fc1": "mlp.fc1", "fc2": "mlp.fc2"}
  for layer in range(sizes.depth):
    block, name = params[f"block_{layer}"], f"{'layers' if in_memory else 'encoder.layer'}.{layer}"
    for key, place in dense.items():
      _dense(disk, f"{name}.{place}", block[key] if key in block else block["attention"][key])
    _norm(disk, f"{name}.layernorm_before", block["norm1"])
    _norm(disk, f"{name}.layernorm_after", block["norm2"])
  _norm(disk, "layernorm", params["norm"])
  return disk


# how the modules are called: before flax.linen, since then
OLD = {"attention": "MultiHeadDotProductAttention_1", "norm2": "LayerNorm_2", "mlp": "MlpBlock_3"}
LINEN = {"attention": "MultiHeadDotProductAttention_0", "norm2": "LayerNorm_1", "mlp": "MlpBlock_0"}


def to_google(params: dict, sizes: Sizes, names: dict = OLD) -> dict:
  """Returns what Google's vision_transformer would write, with a head."""
  p, heads = sizes.patch_size, (sizes.num_heads, sizes.width // sizes.num_heads)
  disk = {
    "cls": params["cls"][None],
    "Transformer/posembed_input/pos_embedding": params["position"][None],
    "embedding/kernel": params["embedding"]["kernel"].reshape(p, p, 3, -1),
    "embedding/bias": params["embedding"]["bias"],
    "head/kernel": np.ones((sizes.width, 5), np.float32),
  }
  for layer in range(sizes.depth):
    block, name = params[f"block_{layer}"], f"Transformer/encoderblock_{layer}"
    disk |= {f"{name}/LayerNorm_0/{key}": leaf for key, leaf in block["norm1"].items()}
    disk |= {f"{name}/{names['norm2']}/{key}": leaf for key, leaf in block["norm2"].items()}
    for key, projection in block["attention"].items():
      kernel, bias = projection["dense"]["kernel"], projection["dense"]["bias"]
      if key == "out":
        kernel = kernel.reshape(*heads, -1)
      else:
        kernel, bias = kernel.reshape(-1, *heads), bias.reshape(heads)
      disk |= {f"{name}/{names['attention']}/{key}/kernel": kernel}
      disk |= {f"{name}/{names['attention']}/{key}/bias": bias}
    for i in range(2):
      dense = block[f"fc{i + 1}"]["dense"]
      disk |= {f"{name}/{names['mlp']}/Dense_{i}/{key}": leaf for key, leaf in dense.items()}
  return disk | {f"Transformer/encoder_norm/{key}": leaf for key, leaf in params["norm"].items()}


def to_big_vision(params: dict, sizes: Sizes, *, scan: bool = False) -> dict:
  """Returns what big_vision would write, whose class token has its position already added."""
  disk = to_google(params, sizes, LINEN)
  position = disk.pop("Transformer/posembed_input/pos_embedding")
  disk |= {"pos_embedding": position[:, 1:], "cls": disk["cls"] + position[:, :1]}
  if scan:
    first = "Transformer/encoderblock_0/"
    for name in [name for name in disk if name.startswith(first)]:
      layers = [name.replace("_0/", f"_{layer}/", 1) for layer in range(sizes.depth)]
      disk[name.replace("_0/", "/", 1)] = np.stack([disk.pop(layer) for layer in layers])
  return {f"params/{name}": tensor for name, tensor in disk.items()}
