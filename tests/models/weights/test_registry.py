"""Files on disk -> parameters of our ViT; every wrong file or field gives one clear line."""

import dataclasses
import hashlib
import json
import pathlib
import re
import struct

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from on_disk import (
  TINY,
  TINY_SCALED,
  assert_equal,
  random_params,
  to_big_vision,
  to_dinov2,
  to_google,
  to_hf_vit,
  to_timm,
  write,
  write_npz,
)

from fmlora_jax.config import ConfigError, WeightsConfig
from fmlora_jax.models import vit
from fmlora_jax.models.weights import files, layouts, published, registry
from fmlora_jax.types import Sizes


@pytest.fixture(autouse=True)
def tiny_checkpoints(monkeypatch):
  """Two checkpoints of a size that tests can afford, found by tag like the real ones."""
  monkeypatch.setitem(vit.ARCHITECTURES, "tiny", TINY)
  monkeypatch.setitem(vit.ARCHITECTURES, "tiny_scaled", TINY_SCALED)
  for tag, architecture, layout in (
    ("tiny_timm", "tiny", "timm"),
    ("tiny_dinov2", "tiny_scaled", "dinov2"),
  ):
    file = published.CheckpointFile(layout=layout, repository=f"ada/{layout}")
    source = published.Checkpoint(
      files=(file,), architecture=architecture, normalisation="imagenet"
    )
    monkeypatch.setitem(registry.WEIGHTS, tag, source)


@pytest.fixture
def timm_file(tmp_path):
  return write(tmp_path / "model.safetensors", to_timm(random_params(TINY), TINY))


# What is loaded.


@pytest.mark.parametrize("tag", registry.WEIGHTS)
def test_every_tag_names_a_known_architecture_and_layout(tag):
  source = registry.WEIGHTS[tag]
  assert source.architecture in (*vit.ARCHITECTURES, None)
  assert {file.layout for file in source.files} <= layouts.LAYOUTS.keys()
  assert len({file.layout for file in source.files}) == len(source.files)
  assert bool(source.files) == (tag != "random")
  for file in source.files:
    assert re.fullmatch("[0-9a-f]{64}", file.sha256 or "0" * 64)
    assert re.fullmatch("[0-9a-f]{40}", file.revision or "0" * 40)
    assert file.revision is None or file.sha256  # the commit is named for the sake of the hash
  if tag not in ("micro_letters", "random"):
    assert source.files[0].repository


def test_a_timm_file_becomes_the_params_it_was_made_from(timm_file):
  params, sizes, info = registry.load(WeightsConfig(tag="tiny_timm", path=timm_file), 16)
  assert_equal(params, random_params(TINY))
  assert sizes == TINY
  digest = hashlib.sha256(pathlib.Path(timm_file).read_bytes()).hexdigest()
  assert info == registry.WeightsInfo(
    tag="tiny_timm",
    file="model.safetensors",
    sha256=digest,
    normalisation="imagenet",
    ignored=("head.weight",),
  )


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_float_types_become_float32(tmp_path, dtype):
  params = jax.tree.map(lambda leaf: leaf.astype(dtype), random_params(TINY))
  path = write(tmp_path / "half.safetensors", to_timm(params, TINY))
  ours, _, _ = registry.load(WeightsConfig(tag="tiny_timm", path=path))
  assert_equal(ours, jax.tree.map(lambda leaf: leaf.astype(np.float32), params))


@pytest.mark.parametrize("size", ["tiny", pytest.param("vit_b16", marks=pytest.mark.tier(2))])
def test_every_file_of_a_checkpoint_gives_the_same_features(tmp_path, monkeypatch, size):
  sizes = vit.ARCHITECTURES[size]
  source = published.Checkpoint(
    files=tuple(published.CheckpointFile(layout=layout) for layout in ("timm", "google")),
    architecture=size,
    normalisation="half",
  )
  monkeypatch.setitem(registry.WEIGHTS, "any", source)
  params = random_params(sizes, scale=0.02)
  image = np.random.default_rng(1).normal(size=(1, sizes.image_size, sizes.image_size, 3))
  apply = jax.jit(vit.make_vit(sizes).apply)
  reference = apply(params, image.astype(np.float32))
  assert np.ptp(reference) > 0.01

  path = tmp_path / "file"
  for disk in (
    lambda: write(path, to_timm(params, sizes)),
    lambda: write_npz(path, to_google(params, sizes)),
    lambda: write_npz(path, to_big_vision(params, sizes, scan=True)),
  ):
    disk()
    ours, ours_sizes, info = registry.load(WeightsConfig(tag="any", path=str(path)))
    assert ours_sizes == sizes
    features = apply(ours, image.astype(np.float32))
    np.testing.assert_allclose(features, reference, rtol=0, atol=1e-5)
    assert info.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("to_disk", [to_timm, to_dinov2])
def test_timm_and_hugging_face_files_of_dinov2_are_the_same_network(tmp_path, to_disk):
  params = random_params(TINY_SCALED)
  path = write(tmp_path / "x", to_disk(params, TINY_SCALED))
  ours, sizes, _ = registry.load(WeightsConfig(tag="", path=path, architecture="tiny_scaled"))
  assert_equal(ours, params)
  assert sizes == TINY_SCALED


@pytest.mark.parametrize("gelu", ["erf", "tanh"])
def test_the_config_may_name_the_gelu(timm_file, gelu):
  _, sizes, _ = registry.load(WeightsConfig(tag="tiny_timm", path=timm_file, gelu=gelu))
  assert sizes == dataclasses.replace(TINY, gelu=gelu)


BESIDE = {"model_type": "vit", "layer_norm_eps": 1e-12, "hidden_act": "gelu"}


@pytest.mark.parametrize(
  ("facts", "changes", "message"),
  [
    (None, {}, None),
    ({}, {}, None),
    ({"hidden_act": "gelu_new"}, {"gelu": "tanh"}, None),
    ({"layer_norm_eps": 1e-6}, {"epsilon": 1e-6}, None),
    (
      {"layer_norm_eps": 1e-6},
      {},
      "config.weights.epsilon is 1e-12: must be 1e-06, as .*json says",
    ),
    ({"hidden_act": "gelu_new"}, {}, "config.weights.gelu is 'erf': must be 'tanh', as"),
    ({"hidden_act": "relu"}, {}, "config.json: hidden_act is 'relu': must be one of gelu, "),
    ({"num_attention_heads": 3}, {}, "config.weights.architecture: num_heads is 2: must be 3, as"),
  ],
)
def test_a_vit_of_hugging_face_is_computed_as_the_config_beside_it_says(
  tmp_path, facts, changes, message
):
  path = write(tmp_path / "model.safetensors", to_hf_vit(random_params(TINY), TINY))
  beside = "[" if facts is None else json.dumps(BESIDE | facts)  # a damaged one says nothing
  (tmp_path / "config.json").write_text(beside)
  weights = WeightsConfig(tag="", path=path, architecture="tiny", **changes)
  if message:
    with pytest.raises(ConfigError, match=message):
      registry.load(weights)
  else:
    ours, sizes, _ = registry.load(weights)
    assert_equal(ours, random_params(TINY))
    assert sizes == dataclasses.replace(TINY, **{"epsilon": 1e-12} | changes)


def test_an_mae_file_of_timm_loads_without_a_tag(tmp_path):
  """It has no head; its mask token and decoder stayed with its authors."""
  disk = to_timm(random_params(TINY), TINY)
  del disk["head.weight"]
  path = write(tmp_path / "x", disk)
  ours, _, info = registry.load(WeightsConfig(tag="", path=path, architecture="tiny"))
  assert_equal(ours, random_params(TINY))
  assert (info.tag, info.normalisation, info.ignored) == ("file", None, ())


def test_saved_params_come_back_without_a_tag(tmp_path):
  params = random_params(TINY)
  path = tmp_path / "mine.safetensors"
  metadata = {"architecture": "tiny", "normalisation": "half", "gelu": "tanh", "made by": "me"}
  files.save(params, path, metadata)
  ours, sizes, info = registry.load(WeightsConfig(tag="", path=str(path)))
  assert_equal(ours, params)
  assert sizes.gelu == "tanh"
  assert (info.tag, info.file, info.normalisation) == ("file", "mine.safetensors", "half")
  assert list(tmp_path.iterdir()) == [path]


def test_save_keeps_dtypes_and_writes_transposed_arrays_right(tmp_path):
  kernel = np.arange(6, dtype=np.float16).reshape(2, 3).T
  files.save({"norm": {"bias": kernel}}, tmp_path / "x", {})
  saved = safetensors.numpy.load_file(tmp_path / "x")["norm/bias"]
  np.testing.assert_array_equal(saved, kernel)
  assert saved.dtype == np.float16


def test_a_file_without_a_tag_takes_the_architecture_of_the_config(timm_file):
  params, _, info = registry.load(WeightsConfig(tag="", path=timm_file, architecture="tiny"))
  assert_equal(params, random_params(TINY))
  assert info.normalisation is None


def test_depth_takes_the_first_blocks_and_names_the_tensors_of_the_others(timm_file):
  config = WeightsConfig(tag="tiny_timm", path=timm_file, depth=2)
  params, sizes, info = registry.load(config)
  whole = random_params(TINY)
  del whole["block_2"]
  assert_equal(params, whole)
  assert sizes.depth == 2
  assert set(info.ignored) == {
    "head.weight",
    *(name for name in to_timm(random_params(TINY), TINY) if name.startswith("blocks.2.")),
  }


def test_a_damaged_tensor_that_is_not_used_does_no_harm(tmp_path):
  disk = to_timm(random_params(TINY), TINY)
  disk["blocks.2.norm1.bias"] = np.full(12, np.nan, np.float32)
  path = write(tmp_path / "x", disk)
  registry.load(WeightsConfig(tag="tiny_timm", path=path, depth=2))


def test_random_weights_are_the_same_each_time():
  config = WeightsConfig(tag="random", architecture="tiny", depth=1)
  params, sizes, info = registry.load(config, 24)
  again, _, _ = registry.load(config, 24)
  assert_equal(params, again)
  assert (sizes.depth, sizes.image_size) == (1, 24)
  assert params["position"].shape == (37, 12)
  assert info == registry.WeightsInfo(tag="random", file=None, sha256=None, normalisation="half")


def test_the_shipped_weights_load():
  params, sizes, info = registry.load(WeightsConfig(tag="micro_letters"))
  assert sizes == vit.ARCHITECTURES["micro"]
  assert info.normalisation == "half"
  features = vit.make_vit(sizes).apply(params, np.zeros((1, 32, 32, 3), np.float32))
  assert np.isfinite(features).all()


def test_another_image_size_changes_the_positions_only(timm_file):
  params, sizes, _ = registry.load(WeightsConfig(tag="tiny_timm", path=timm_file), 8)
  reference = random_params(TINY)
  assert params["position"].shape == (sizes.num_tokens, 12) == (5, 12)
  reference["position"] = layouts.resize_positions(reference["position"], 2, antialias=True)
  assert_equal(params, reference)


# Wrong fields.


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (
      {"tag": "dinov2_smal"},
      "config.weights.tag is 'dinov2_smal': must be one of .* did you mean",
    ),
    ({"tag": ""}, "config.weights.tag is '': must be a tag, or config.weights.path must name"),
    ({"tag": "random"}, "config.weights.architecture is None: must be one of .*'vit_b16'"),
    ({"tag": "random", "architecture": "vit_b"}, "architecture is 'vit_b': must be one of"),
    (
      {"tag": "random", "architecture": "tiny", "path": "x"},
      "path is 'x': tag 'random' reads no file",
    ),
    (
      {"tag": "tiny_timm", "path": "FILE", "architecture": "vit_b16"},
      "config.weights.architecture is 'vit_b16': tag 'tiny_timm' is a tiny; leave it out",
    ),
    (
      {"tag": "tiny_timm", "path": "FILE", "depth": 4},
      "config.weights.depth is 4: must be in 1..3",
    ),
    ({"tag": "", "path": "FILE"}, "config.weights.architecture is not set"),
    (
      {"tag": "tiny_timm", "path": "/"},
      "config.weights.path is '/': a folder; name the file in it",
    ),
  ],
)
def test_a_wrong_field_is_named(fields, message, timm_file):
  fields = {key: timm_file if value == "FILE" else value for key, value in fields.items()}
  with pytest.raises(ValueError, match=message):
    registry.load(WeightsConfig(**fields))


@pytest.mark.parametrize(("image_size", "near"), [(18, 16), (19, 20), (1, 4), (0, 4), (-4, 4)])
def test_an_image_size_that_is_no_multiple_of_the_patch_is_refused(image_size, near, timm_file):
  message = f"config.input.image_size is {image_size}: must be a multiple .* such as {near}$"
  with pytest.raises(ValueError, match=message):
    registry.load(WeightsConfig(tag="tiny_timm", path=timm_file), image_size)


def test_a_file_that_is_not_there_says_where_to_get_it():
  message = r"path is 'no/such': no such file; run `hf download ada/timm model.safetensors`"
  with pytest.raises(ConfigError, match=message):
    registry.load(WeightsConfig(tag="tiny_timm", path="no/such"))


# Wrong files.


def refusal(tag: str, path: str, **fields) -> str:
  """Returns the message that loading this file ends with; it names the file and is one line."""
  with pytest.raises(ValueError, match=re.escape(path)) as caught:
    registry.load(WeightsConfig(tag=tag, path=path, **fields))
  message = str(caught.value)
  assert "\n" not in message
  assert caught.value.__suppress_context__ or caught.value.__context__ is None
  return message


@pytest.mark.parametrize(
  ("content", "reason"),
  [
    (b"", "empty: get it again"),
    (b"abc", "damaged or truncated"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a Git LFS pointer"),
    (b"<!DOCTYPE html><html>not found</html>", "a web page"),
    (b"\x80\x02}q\x00.", "a Python pickle, which is never opened"),
    (b"PK\x03\x04" + bytes(60), "damaged or truncated (File is not a zip file)"),
    (b"\xff" * 64, "damaged or truncated"),
  ],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path, content, reason):
  path = tmp_path / "model.safetensors"
  path.write_bytes(content)
  assert reason in refusal("tiny_timm", str(path))


@pytest.mark.parametrize("share", [0.001, 0.02, 0.5, 0.999])
def test_a_file_that_was_cut_off_is_refused(timm_file, share):
  path = pathlib.Path(timm_file)
  content = path.read_bytes()
  path.write_bytes(content[: int(len(content) * share)])
  assert "damaged or truncated" in refusal("tiny_timm", timm_file)


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3"])
def test_a_quantised_file_is_refused(tmp_path, dtype):
  header = {"cls_token": {"dtype": dtype, "shape": [1, 1, 12], "data_offsets": [0, 12]}}
  text = json.dumps(header).encode()
  path = tmp_path / "x"
  path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(12))
  message = refusal("tiny_timm", str(path))
  assert f"tensor cls_token is {dtype}: must be one of F16, BF16, F32, F64" in message


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_tensor_that_is_not_finite_is_named(tmp_path, value):
  disk = to_timm(random_params(TINY), TINY)
  disk["blocks.1.mlp.fc1.bias"][3] = value
  message = refusal("tiny_timm", write(tmp_path / "x", disk))
  assert "tensor blocks.1.mlp.fc1.bias holds NaN or infinity" in message


def test_a_file_of_zeros_is_refused(tmp_path):
  disk = to_timm(random_params(TINY), TINY)
  zeros = {name: np.zeros_like(tensor) for name, tensor in disk.items()}
  message = refusal("tiny_timm", write(tmp_path / "x", zeros))
  assert "x: all its tensors are 0: the file is damaged; get it again; is it a file of" in message
  zeros["blocks.2.mlp.fc2.bias"][0] = 1e-3
  registry.load(WeightsConfig(tag="tiny_timm", path=write(tmp_path / "y", zeros)))


def test_missing_unknown_and_misshapen_tensors_are_reported_together(tmp_path):
  disk = to_timm(random_params(TINY), TINY)
  del disk["blocks.0.norm1.bias"]
  disk["reg_token"] = np.zeros((1, 4, 12), np.float32)
  disk["blocks.2.mlp.fc1.weight"] = np.zeros((24, 12), np.float32)
  message = refusal("tiny_timm", write(tmp_path / "x", disk))
  assert "width 12, depth 3, patch size 4 in layout 'timm'" in message
  assert "missing (1): block_0/norm1/bias;" in message
  assert "unknown (1): reg_token;" in message
  assert (
    "blocks.2.mlp.fc1.weight -> block_2/fc1/dense/kernel (12, 24) instead of (12, 48)" in message
  )
  assert "is it a file of 'tiny_timm'? run `hf download ada/timm" in message


def test_more_blocks_than_the_architecture_has_are_unknown(tmp_path):
  deep = Sizes(image_size=16, patch_size=4, width=12, depth=5, num_heads=2)
  path = write(tmp_path / "x", to_timm(random_params(deep), deep))
  message = refusal("tiny_timm", path)
  assert "unknown (24): blocks.3.attn.proj.bias" in message
  assert "and 20 more" in message


def test_a_file_of_another_layout_is_recognised(timm_file):
  assert "its names look like layout 'timm'" in refusal("tiny_dinov2", timm_file)


def test_names_that_mean_nothing_are_refused(tmp_path):
  path = write(tmp_path / "x", {"a": np.zeros(1, np.float32)})
  message = refusal("", path, architecture="tiny")
  assert "no tensor has a name as in one of the layouts" in message


@pytest.mark.parametrize("metadata", [{"normalisation": "mean"}, {"gelu": "quick"}])
def test_metadata_that_mean_nothing_are_refused(tmp_path, metadata):
  path = tmp_path / "x"
  files.save(random_params(TINY), path, metadata)
  message = refusal("", str(path), architecture="tiny")
  assert "must be one of half, zero_one, imagenet and one of erf, tanh" in message


def test_another_file_than_the_tag_promises_is_refused(timm_file, monkeypatch):
  file = published.CheckpointFile(
    layout="timm", repository="ada/timm", revision="abc", sha256="0" * 64
  )
  source = published.Checkpoint(files=(file,), architecture="tiny", normalisation="half")
  monkeypatch.setitem(registry.WEIGHTS, "pinned", source)
  message = refusal("pinned", timm_file)
  digest = hashlib.sha256(pathlib.Path(timm_file).read_bytes()).hexdigest()
  assert f"has sha256 {digest}: must be {'0' * 64}; is it a file of 'pinned'?" in message
  assert "`hf download ada/timm model.safetensors --revision abc`" in message
  fields = {"tag": "", "path": timm_file, "architecture": "tiny"}  # as the message says
  assert "--config.weights.tag='' --config.weights.architecture=tiny " in message
  params, _, info = registry.load(WeightsConfig(**fields))
  assert_equal(params, random_params(TINY))
  assert info.sha256 == digest
