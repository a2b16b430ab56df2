"""Names and shapes on disk -> parameters of our ViT."""

import dataclasses
import re

import jax
import ml_dtypes
import numpy as np
import PIL.Image
import pytest
from on_disk import (
  LINEN,
  OLD,
  TINY,
  TINY_SCALED,
  assert_equal,
  random_params,
  to_big_vision,
  to_dinov2,
  to_google,
  to_hf_vit,
  to_timm,
)

from fmlora_jax.models import vit
from fmlora_jax.models.weights import layouts
from fmlora_jax.types import Sizes


def test_layer_scale_of_a_timm_file_is_read():
  params = random_params(TINY_SCALED)
  ours, _ = layouts.convert(to_timm(params, TINY_SCALED), "timm", TINY_SCALED)
  assert_equal(ours, params)


@pytest.mark.parametrize("new_names", [False, True])
@pytest.mark.parametrize("prefix", ["", "dinov2."])
def test_a_dinov2_file_is_read_under_all_its_names(new_names, prefix):
  params = random_params(TINY_SCALED)
  disk = to_dinov2(params, TINY_SCALED, new_names)
  disk = {prefix + name: tensor for name, tensor in disk.items()}
  ours, ignored = layouts.convert(disk, "dinov2", TINY_SCALED)
  assert_equal(ours, params)
  assert ignored == (f"{prefix}embeddings.mask_token",)


HF_HEADS = {  # what each class of transformers adds to its backbone
  "": ("pooler.dense.weight", "pooler.dense.bias", "embeddings.mask_token"),
  "vit.": (
    "classifier.weight",
    "vit.embeddings.mask_token",
    "decoder.0.weight",
    "decoder.a.layernorm_before.bias",
  ),
  "deit.": ("classifier.weight", "deit.pooler.dense.bias"),
}


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("prefix", HF_HEADS)
def test_a_vit_of_hugging_face_is_read_under_all_its_names(prefix, in_memory):
  params = random_params(TINY)
  disk = {prefix + name: x for name, x in to_hf_vit(params, TINY, in_memory).items()}
  disk |= dict.fromkeys(HF_HEADS[prefix], np.ones(12, np.float32))
  assert layouts.guess_layout(disk) == "hf_vit"
  ours, ignored = layouts.convert(disk, "hf_vit", TINY)
  assert_equal(ours, params)
  assert ignored == HF_HEADS[prefix]


@pytest.mark.parametrize("token", ["embeddings.distillation_token", "dist_token"])
def test_a_distilled_deit_is_refused(token):
  layout = "timm" if token == "dist_token" else "hf_vit"
  disk = {"timm": to_timm, "hf_vit": to_hf_vit}[layout](random_params(TINY), TINY)
  disk |= {token: np.ones((1, 1, 12), np.float32)}
  with pytest.raises(ValueError, match="it has a distillation token: use the DeiT without one"):
    layouts.convert(disk, layout, TINY)


@pytest.mark.parametrize("names", [OLD, LINEN])
@pytest.mark.parametrize("place", ["Transformer/posembed_input/", "Transformer/", ""])
@pytest.mark.parametrize("prefix", ["", "params/"])
def test_a_google_file_is_read_under_all_its_names(names, place, prefix):
  params = random_params(TINY)
  disk = to_google(params, TINY, names)
  disk[f"{place}pos_embedding"] = disk.pop("Transformer/posembed_input/pos_embedding")
  disk |= {"pre_logits/kernel": np.ones((12, 12)), "pre_logits/bias": np.ones(12)}
  disk = {prefix + name: tensor for name, tensor in disk.items()}
  assert layouts.guess_layout(disk) == "google"
  ours, ignored = layouts.convert(disk, "google", TINY)
  assert_equal(ours, params)
  assert ignored == tuple(
    prefix + x for x in ("head/kernel", "pre_logits/kernel", "pre_logits/bias")
  )


@pytest.mark.parametrize("scan", [False, True])
def test_a_class_token_without_position_makes_the_same_features(scan):
  """big_vision adds the class token's position to the token; ours has a row for it, then 0."""
  params = random_params(TINY)
  disk = to_big_vision(params, TINY, scan=scan)
  assert layouts.guess_layout(disk) == "google"
  ours, ignored = layouts.convert(disk, "google", TINY)
  assert not ours["position"][0].any()
  assert ignored == ("params/head/kernel",)
  images = np.random.default_rng(1).normal(size=(2, 16, 16, 3)).astype(np.float32)
  apply = vit.make_vit(TINY).apply
  np.testing.assert_allclose(apply(ours, images), apply(params, images), rtol=0, atol=1e-5)
  ours["position"][0], ours["cls"] = params["position"][0], params["cls"]
  assert_equal(ours, params)


def test_a_scanned_file_can_be_cut_to_its_first_blocks():
  short = Sizes(image_size=16, patch_size=4, width=12, depth=2, num_heads=2)
  disk = to_big_vision(random_params(TINY), TINY, scan=True)
  ours, ignored = layouts.convert(disk, "google", short, truncate=True)
  assert_equal(ours["block_1"], random_params(TINY)["block_1"])
  assert len(ignored) == 17  # the head and the 16 tensors of the block that is left out
  with pytest.raises(ValueError, match=r"unknown \(16\): params/Transformer/encoderblock_2/"):
    layouts.convert(disk, "google", short)


def test_bfloat16_and_another_number_of_heads():
  params = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), random_params(TINY))
  disk = to_google(params, TINY)
  ours, _ = layouts.convert(disk, "google", TINY)
  assert_equal(ours, jax.tree.map(lambda leaf: leaf.astype(np.float32), params))
  heads = Sizes(image_size=16, patch_size=4, width=12, depth=3, num_heads=3)
  message = r"wrong shape \(21\): .*query/kernel -> .*\(12, 2, 6\) instead of \(12, 12\)"
  with pytest.raises(ValueError, match=message):
    layouts.convert(disk, "google", heads)


@pytest.mark.parametrize("layout", ["timm", "google"])
def test_a_network_that_averages_its_patches_is_refused(layout):
  """MAE fine-tuned in timm has fc_norm and no norm; big_vision's default has no class token."""
  params = random_params(TINY)
  if layout == "timm":
    disk = to_timm(params, TINY)
    disk = {re.sub(r"^norm\.", "fc_norm.", name): tensor for name, tensor in disk.items()}
    names = r"missing \(2\): .*norm/bias.*unknown \(2\): fc_norm\.weight"
  else:
    disk = to_big_vision(params, TINY)
    del disk["params/cls"]
    names = r"missing \(1\): cls"
  with pytest.raises(ValueError, match=f"{names}.*it seems to pool its patches"):
    layouts.convert(disk, layout, TINY)


# Positions.


def bicubic(source: int, target: int, a: float = -0.75) -> np.ndarray:
  """Returns the [target, source] matrix of torch's bicubic interpolation without antialiasing."""
  at = (np.arange(target) + 0.5) * source / target - 0.5
  matrix = np.zeros((target, source))
  for offset in range(-1, 3):
    column = np.floor(at).astype(int) + offset
    t = np.abs(at - column)
    near, far = (a + 2) * t**3 - (a + 3) * t**2 + 1, a * (t**3 - 5 * t**2 + 8 * t - 4)
    column = column.clip(0, source - 1)  # the border repeats
    np.add.at(matrix, (np.arange(target), column), np.where(t <= 1, near, far))
  return matrix


@pytest.mark.parametrize(("source", "target"), [(37, 16), (37, 4), (5, 4), (4, 9), (2, 3), (3, 1)])
def test_positions_are_interpolated_as_by_torch(source, target):
  position = np.random.default_rng(0).normal(size=(source**2 + 1, 3)).astype(np.float32)
  resized = layouts.resize_positions(position, target)
  matrix, square = bicubic(source, target), position[1:].reshape(source, source, 3)
  reference = np.einsum("ia,jb,abc->ijc", matrix, matrix, square).reshape(-1, 3)
  np.testing.assert_array_equal(resized[0], position[0])
  # measured: 1.5e-6 at 4 -> 9, where jax's sampling points are rounded to float32
  np.testing.assert_allclose(resized[1:], reference, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("source", "target"), [(37, 16), (14, 4), (4, 9), (14, 24), (3, 1)])
def test_positions_are_interpolated_with_antialiasing_as_by_pillow(source, target):
  """torch took its antialiasing, that timm asks for, from Pillow."""
  position = np.random.default_rng(0).normal(size=(source**2 + 1, 3)).astype(np.float32)
  resized = layouts.resize_positions(position, target, antialias=True)
  for channel in range(3):
    image = PIL.Image.fromarray(position[1:, channel].reshape(source, source))
    reference = np.asarray(image.resize((target, target), PIL.Image.Resampling.BICUBIC))
    ours = resized[1:, channel].reshape(target, target)
    np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-5)
  np.testing.assert_array_equal(resized[0], position[0])


@pytest.mark.parametrize(
  ("layout", "antialias"),
  [("ours", False), ("timm", True), ("google", True), ("dinov2", False), ("hf_vit", False)],
)
def test_positions_are_interpolated_as_by_the_library_of_the_file(layout, antialias):
  sizes = TINY_SCALED if layout == "dinov2" else TINY
  params = random_params(sizes)
  write = {"ours": lambda p, _: layouts.flatten(p), "timm": to_timm, "google": to_google}
  disk = (write | {"dinov2": to_dinov2, "hf_vit": to_hf_vit})[layout](params, sizes)
  small = dataclasses.replace(sizes, image_size=8)
  ours, _ = layouts.convert(disk, layout, small)
  params["position"] = layouts.resize_positions(params["position"], 2, antialias=antialias)
  assert_equal(ours, params)


def test_positions_of_the_same_grid_stay_bit_for_bit():
  position = np.random.default_rng(0).normal(size=(17, 3)).astype(np.float32)
  assert layouts.resize_positions(position, 4) is position


def test_a_tensor_under_two_names_is_refused():
  params = random_params(TINY_SCALED)
  disk = to_dinov2(params, TINY_SCALED) | to_dinov2(params, TINY_SCALED, new_names=True)
  with pytest.raises(ValueError, match=r"unknown \(24\): encoder.layer.0.attention.q_proj"):
    layouts.convert(disk, "dinov2", TINY_SCALED)


@pytest.mark.parametrize(
  "shape", [(), (0,), (1,), (35, 12), (36, 12, 1, 1), (0, 3, 4, 4), (4, 4, 3, 0), (2, 6, 0)]
)
@pytest.mark.parametrize(
  ("to_disk", "name"),
  [
    (to_timm, "cls_token"),
    (to_timm, "pos_embed"),
    (to_timm, "patch_embed.proj.weight"),
    (to_timm, "blocks.0.attn.qkv.weight"),
    (to_timm, "norm.bias"),
    (to_google, "cls"),
    (to_google, "Transformer/posembed_input/pos_embedding"),
    (to_google, "embedding/kernel"),
    (to_google, "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/out/kernel"),
    (to_google, "Transformer/encoder_norm/bias"),
  ],
)
def test_no_shape_ends_in_a_stack_trace(to_disk, name, shape):
  disk = to_disk(random_params(TINY), TINY) | {name: np.zeros(shape, np.float32)}
  with pytest.raises(ValueError, match=f"wrong shape .*{re.escape(name)} ->"):
    layouts.convert(disk, "timm" if to_disk is to_timm else "google", TINY)


@pytest.mark.parametrize("shape", [(), (0,), (2, 12), (4, 12), (3,)])
def test_no_shape_of_stacked_blocks_ends_in_a_stack_trace(shape):
  name = "params/Transformer/encoderblock/LayerNorm_0/scale"
  disk = to_big_vision(random_params(TINY), TINY, scan=True)
  with pytest.raises(ValueError, match="the tensors do not make a ViT of width 12, depth 3"):
    layouts.convert(disk | {name: np.zeros(shape, np.float32)}, "google", TINY)
