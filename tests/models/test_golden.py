"""The ViT, its importers and its adapters against reference outputs.

tests/golden/*.npz hold small random float32 models of timm 1.0.31 and transformers 5.23 and 5.24
(torch 2.13) under their names on disk, an image batch (NCHW) and what the reference makes of it.
Measured maximal differences on a CPU are below 2e-6.
"""

import dataclasses
import pathlib

import flax.linen as nn  # noqa: TID251
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmlora_jax.models import low_rank, vit
from fmlora_jax.models.weights import layouts
from fmlora_jax.types import Adapters, LayerAdapters, LowRank, Prefix, Sizes

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
TOLERANCE = 2e-5
TIMM = Sizes(image_size=32, patch_size=8, width=32, depth=3, num_heads=4)
DINOV2 = Sizes(image_size=56, patch_size=14, width=32, depth=2, num_heads=4, layer_scale=True)


@pytest.fixture(autouse=True)
def full_precision():
  with jax.default_matmul_precision("highest"):
    yield


class Golden:
  """One golden file: the importer's params, the images as NHWC, and the reference outputs."""

  def __init__(self, name: str, layout: str, sizes: Sizes, drop: tuple[str, ...] = ()):
    with np.load(GOLDEN / f"{name}.npz") as file:
      self.arrays = dict(file)
    prefix = "param/"
    self.disk = {k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)}
    if "reg_token" in self.disk:  # our prompt; its rows of pos_embed are no part of ours
      self.registers = self.disk.pop("reg_token")[0]
      position = self.disk["pos_embed"]
      count = len(self.registers)
      self.register_positions = position[0, 1 : count + 1]
      self.disk["pos_embed"] = np.delete(position, range(1, count + 1), axis=1)
    self.params, self.ignored = layouts.convert(self.disk, layout, sizes)
    self.images = self.arrays["image"].transpose(0, 2, 3, 1)
    self.backbone = vit.make_vit(sizes)

  def logits(self, features: np.ndarray) -> np.ndarray:
    return features @ self.disk["head.weight"].T + self.disk["head.bias"]


def assert_near(ours, reference):
  assert ours.shape == reference.shape
  np.testing.assert_allclose(np.asarray(ours), reference, rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def timm_vit():
  return Golden("timm_vit", "timm", TIMM)


def test_tokens_features_and_logits_are_those_of_timm(timm_vit):
  assert_near(timm_vit.backbone.tokens(timm_vit.params, timm_vit.images), timm_vit.arrays["tokens"])
  features = timm_vit.backbone.apply(timm_vit.params, timm_vit.images)
  assert_near(features, timm_vit.arrays["cls"])
  assert_near(timm_vit.logits(features), timm_vit.arrays["logits"])
  assert timm_vit.ignored == ("head.weight", "head.bias")


def test_prompt_tokens_are_the_registers_of_timm():
  golden = Golden("timm_vit_reg4", "timm", TIMM)
  assert not golden.register_positions.any()  # timm's registers have no position, as our prompt
  adapters = Adapters(prompt=golden.registers)
  tokens = golden.backbone.tokens(golden.params, golden.images, adapters)
  assert_near(tokens, golden.arrays["tokens"])
  features = golden.backbone.apply(golden.params, golden.images, adapters)
  assert_near(features, golden.arrays["cls"])
  assert_near(golden.logits(features), golden.arrays["logits"])


def test_a_low_rank_delta_is_lora_in_timm_applied_or_folded():
  golden = Golden("timm_vit_lora_qv", "timm", TIMM)
  scale = float(golden.arrays["scale"])

  def stack(kind, name):
    return np.stack([golden.arrays[f"lora_{kind}/{layer}/{name}"] for layer in range(TIMM.depth)])

  def delta(name):
    a, b = stack("A", name).swapaxes(1, 2), stack("B", name)
    rank = a.shape[-1]
    return LowRank(a=a, b=b, core=np.tile(scale * np.eye(rank, dtype=np.float32), (len(a), 1, 1)))

  deltas = {"query": delta("q"), "value": delta("v")}
  features = golden.backbone.apply(golden.params, golden.images, Adapters(deltas=deltas))
  assert_near(features, golden.arrays["cls"])
  assert_near(golden.logits(features), golden.arrays["logits"])
  folded = golden.backbone.apply(low_rank.fold_deltas(golden.params, deltas), golden.images)
  assert_near(folded, golden.arrays["cls"])


def test_dinov2_with_interpolated_positions_is_that_of_hugging_face():
  golden = Golden("hf_dinov2", "dinov2", DINOV2)
  assert golden.disk["embeddings.position_embeddings"].shape[1] == 5 * 5 + 1
  assert DINOV2.grid == 4
  assert_near(golden.backbone.tokens(golden.params, golden.images), golden.arrays["tokens"])
  assert_near(golden.backbone.apply(golden.params, golden.images), golden.arrays["cls"])
  assert golden.ignored == ("embeddings.mask_token",)


@pytest.mark.parametrize("size", [32, 48])
def test_a_vit_of_hugging_face_has_its_tokens_features_and_logits(size):
  """Its LayerNorm adds 1e-12 to the variance, which counts where a token is small."""
  sizes = dataclasses.replace(TIMM, depth=2, image_size=size, epsilon=1e-12)
  golden = Golden("hf_vit", "hf_vit", sizes)
  images, tokens = golden.images, golden.arrays["tokens"]
  if size == 48:  # with interpolated positions
    images, tokens = golden.arrays["large"].transpose(0, 2, 3, 1), golden.arrays["large_tokens"]
  found = golden.backbone.tokens(golden.params, images)
  np.testing.assert_allclose(found, tokens, rtol=0, atol=1e-5)
  features = golden.backbone.apply(golden.params, images)
  np.testing.assert_allclose(features, tokens[:, 0], rtol=0, atol=1e-5)
  if size == 32:
    head = (golden.disk["classifier.weight"].T, golden.disk["classifier.bias"])
    assert_near(features @ head[0] + head[1], golden.arrays["logits"])
  assert golden.ignored == ("classifier.bias", "classifier.weight")
  rough = vit.make_vit(dataclasses.replace(sizes, epsilon=1e-6))
  assert np.abs(rough.apply(golden.params, images) - features).max() > 1e-5


class GoogleMlp(nn.Module):
  @nn.compact
  def __call__(self, x):
    hidden = nn.gelu(nn.Dense(4 * x.shape[-1])(x))
    return nn.Dense(x.shape[-1])(hidden)


class GoogleBlock(nn.Module):
  num_heads: int

  @nn.compact
  def __call__(self, x):
    x = x + nn.MultiHeadDotProductAttention(self.num_heads)(nn.LayerNorm()(x))
    return x + GoogleMlp(name="MlpBlock_0")(nn.LayerNorm()(x))


class GoogleEncoder(nn.Module):
  sizes: Sizes

  @nn.compact
  def __call__(self, x):
    x = x + self.param("pos_embedding", nn.initializers.zeros, (1, *x.shape[1:]))
    for layer in range(self.sizes.depth):
      x = GoogleBlock(self.sizes.num_heads, name=f"encoderblock_{layer}")(x)
    return nn.LayerNorm(name="encoder_norm")(x)


class GoogleViT(nn.Module):
  """Google's ViT in flax.linen's own modules: their automatic names are those of the files."""

  sizes: Sizes

  @nn.compact
  def __call__(self, images):
    p, width = self.sizes.patch_size, self.sizes.width
    x = nn.Conv(width, (p, p), strides=(p, p), padding="VALID", name="embedding")(images)
    cls = self.param("cls", nn.initializers.zeros, (1, 1, width))
    x = jnp.concatenate([jnp.tile(cls, (len(x), 1, 1)), x.reshape(len(x), -1, width)], axis=1)
    return GoogleEncoder(self.sizes, name="Transformer")(x)


def test_googles_vit_of_flax_modules_is_ours(timm_vit):
  sizes = dataclasses.replace(TIMM, gelu="tanh")
  module, rng = GoogleViT(sizes), np.random.default_rng(0)
  shapes = jax.eval_shape(module.init, jax.random.key(0), timm_vit.images)["params"]
  params = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), shapes)
  ours, ignored = layouts.convert(layouts.flatten(params), "google", sizes)
  assert not ignored
  tokens = module.apply({"params": params}, timm_vit.images)
  assert np.ptp(tokens) > 0.5
  assert_near(vit.make_vit(sizes).tokens(ours, timm_vit.images), np.asarray(tokens))


def test_the_place_of_prompts_does_not_matter_to_the_class_token(timm_vit):
  """Without a position a prompt is one more key and value, wherever it stands."""
  params, images = timm_vit.params, timm_vit.images
  prompt = jax.random.normal(jax.random.key(0), (5, TIMM.width))

  def run(x):
    for layer in range(TIMM.depth):
      block = vit.Block(TIMM, jnp.float32)
      x, _ = block.apply({"params": params[f"block_{layer}"]}, (x,), LayerAdapters())
    x = x - x.mean(-1, keepdims=True)
    x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    return x * params["norm"]["scale"] + params["norm"]["bias"]

  patches = images.reshape(len(images), 4, 8, 4, 8, 3).transpose(0, 1, 3, 2, 4, 5)
  embedding = params["embedding"]
  patches = patches.reshape(len(images), 16, -1) @ embedding["kernel"] + embedding["bias"]
  patches = patches + params["position"][1:]
  cls = np.broadcast_to(params["cls"] + params["position"][:1], (len(images), 1, TIMM.width))
  prompts = np.broadcast_to(prompt, (len(images), *prompt.shape))

  ours = timm_vit.backbone.apply(params, images, Adapters(prompt=prompt))
  last = run(np.concatenate([cls, patches, prompts], axis=1))[:, 0]
  first = run(np.concatenate([prompts, cls, patches], axis=1))[:, len(prompt)]
  plain = run(np.concatenate([cls, patches], axis=1))[:, 0]
  assert_near(last, np.asarray(ours))
  assert_near(first, np.asarray(ours))
  assert_near(plain, timm_vit.arrays["cls"])  # the reference of this test is itself right
  assert np.abs(plain - ours).max() > 1e-2
  reversed_prompt = timm_vit.backbone.apply(params, images, Adapters(prompt=prompt[::-1]))
  per_sample = timm_vit.backbone.apply(params, images, Adapters(prompt=prompts))
  assert_near(reversed_prompt, np.asarray(ours))
  assert_near(per_sample, np.asarray(ours))


def reference_attention(params, x, key, value, num_heads):
  """Softmax attention of one sample [N, D] in NumPy, float64, one head after the other."""

  def project(name, y):
    dense = params[name]["dense"]
    return y @ np.float64(dense["kernel"]) + np.float64(dense["bias"])

  outputs = []
  width = x.shape[-1] // num_heads
  for head in range(num_heads):
    columns = slice(head * width, (head + 1) * width)
    q = project("query", x)[:, columns]
    k = np.concatenate([key[:, head], project("key", x)[:, columns]])
    v = np.concatenate([value[:, head], project("value", x)[:, columns]])
    weights = np.exp(q @ k.T / np.sqrt(width))
    outputs.append(weights / weights.sum(axis=1, keepdims=True) @ v)
  return project("out", np.concatenate(outputs, axis=1))


@pytest.mark.parametrize("batch", [1, 3])
def test_a_prefix_is_more_keys_and_values(timm_vit, batch):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(3, 6, 32)).astype(np.float32)
  key, value = rng.normal(size=(2, batch, 5, 4, 8)).astype(np.float32)
  params = timm_vit.params["block_1"]["attention"]
  module = vit.Attention(4, jnp.float32)
  ours = module.apply({"params": params}, (x,), {}, Prefix(key=key, value=value))
  reference = [
    reference_attention(params, sample, key[i % batch], value[i % batch], 4)
    for i, sample in enumerate(np.float64(x))
  ]
  assert_near(ours, np.stack(reference))


def test_a_prefix_acts_on_its_own_layers_only(timm_vit):
  """A layer that has no row of the prefix attends as in the plain ViT."""
  rng = np.random.default_rng(1)
  key, value = rng.normal(size=(2, 2, 1, 5, 4, 8)).astype(np.float32)  # layers 0 and 1 of 3
  params, images = timm_vit.params, timm_vit.images
  # A zeroed output projection of a layer hides whatever its attention sees.
  hidden = params
  for layer in range(2):
    block = dict(hidden[f"block_{layer}"])
    out = jax.tree.map(np.zeros_like, block["attention"]["out"])
    block["attention"] = block["attention"] | {"out": out}
    hidden = hidden | {f"block_{layer}": block}
  adapters = Adapters(prefix=tuple(map(Prefix, key, value)))
  apply = timm_vit.backbone.apply
  np.testing.assert_array_equal(apply(hidden, images, adapters), apply(hidden, images))
  assert np.abs(apply(params, images, adapters) - apply(params, images)).max() > 1e-2
