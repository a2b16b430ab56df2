"""L2P: a pool of prompts, of which each sample sees those whose keys are nearest to its query.

Source: Wang et al., Learning to Prompt for Continual Learning, arXiv:2112.08654; settings from the
official JAX code (LP), LAMDA-PILOT (PI) and HiDe-Prompt (HD).

On purpose unlike the public codes: by default each sample has its own prompts, also at test time,
where they let the batch vote, whose images are of one task (`batchwise` brings the vote back); no
position is added to prompts, and none of the image's is moved, where the PyTorch ports resize the
position embeddings; prompts start in [0, 0.01), as in LP, and not in [-1, 1), as in the ports.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from fmlora_jax import config as config_lib
from fmlora_jax.methods.common import base, recipes
from fmlora_jax.methods.common.base import AdaptedViT, StepInputs
from fmlora_jax.models import heads, prompts
from fmlora_jax.types import Adapters, Facts, Features, Images, Params, Rules, Scalar, Variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(config_lib.MethodConfig):
  """Settings of L2P.

  Attributes:
    pool_size: M, prompts and keys.
    length: tokens of a prompt.
    top_n: N, prompts that a sample sees.
    pull: lambda, weight of the cosine between a query and its chosen keys.
    batchwise: all samples of a batch get the prompts that most of them chose, in training and at
      test time: the official codes' vote.
  """

  name: str = "l2p"
  pool_size: int = 10
  length: int = 5
  top_n: int = 5
  pull: float = 1.0
  batchwise: bool = False

  def __post_init__(self):
    for name in ("pool_size", "length"):
      config_lib.require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
    fits = 1 <= self.top_n <= self.pool_size
    config_lib.require(fits, "top_n", self.top_n, f"in 1..pool_size = {self.pool_size}")
    config_lib.require(self.pull >= 0, "pull", self.pull, ">= 0")


@dataclasses.dataclass(frozen=True, eq=False)
class L2P(AdaptedViT[Config]):
  """L2P: prompts [M, P, D] and keys [M, D] of the pool in `shared`; every task trains them all.

  The head sees the mean of the outputs of the prompts.
  """

  query = "always"

  @property
  def caveats(self) -> tuple[str, ...]:
    return (base.BATCH_VOTE,) if self.settings.batchwise else ()

  def init(self, key: PRNGKeyArray, weights: Params) -> Variables:
    settings, width = self.settings, self.backbone.sizes.width
    draw = jax.nn.initializers.uniform(0.01)  # LP/models/vit.py:381
    key_prompt, key_key = jax.random.split(key)
    pool = {
      "prompt": draw(key_prompt, (settings.pool_size, settings.length, width)),
      "key": draw(key_key, (settings.pool_size, width)),
    }
    return super().init(key, weights).update(shared={"pool": pool})

  def match(self, pool: Params, query: Features) -> tuple[Float[Array, "B M"], Int[Array, "B N"]]:
    """Returns the similarities of all keys and the numbers of the chosen ones."""
    settings, similarities = self.settings, prompts.similarity(query, pool["key"])
    return similarities, prompts.choose(similarities, settings.top_n, batchwise=settings.batchwise)

  def adapters(self, variables: Variables, inputs: StepInputs) -> Adapters:
    return self.recall(variables.shared["pool"], inputs.class_tokens)

  def recall(self, memory: Params, query: Features) -> Adapters:
    _, chosen = self.match(memory, query)
    return Adapters(prompt=rearrange(memory["prompt"][chosen], "b n p d -> b (n p) d"))

  def read(self, backbone: Params, images: Images, adapters: Adapters) -> Features:
    assert adapters.prompt is not None
    tokens = self.backbone.tokens(backbone, images, adapters, 1 + adapters.prompt.shape[1])
    return tokens[:, 1:].astype(jnp.float32).mean(1)

  def penalty(self, variables: Variables, inputs: StepInputs, features: Features) -> Scalar:
    del features
    matched = self.match(variables.shared["pool"], inputs.class_tokens)
    return -self.settings.pull * pull(*matched, inputs.valid)

  def folded(self, weights: Params, variables: Variables) -> tuple[Params, Params]:
    return weights, variables.shared["pool"]

  def rules(self, task: int) -> Rules:
    return (("shared/pool/.*", "adapter"), *super().rules(task))

  def stored(self, facts: list[Facts]) -> dict[str, Any]:
    settings, width = self.settings, self.backbone.sizes.width
    count = settings.pool_size * (settings.length + 1) * width
    return super().stored(facts) | {"shared": count}


def pull(
  similarities: Float[Array, "B M"], chosen: Int[Array, "B N"], valid: Bool[Array, " B"]
) -> Scalar:
  """Returns the mean over samples of the summed cosines to the chosen keys.

  Source: L2P (arXiv:2112.08654) Sec. 4.3.
  """
  return heads.weighted_mean(jnp.take_along_axis(similarities, chosen, axis=1).sum(1), valid)


METHOD = L2P

_PIXELS = {"augmentation": "pilot", "normalisation": "zero_one"}  # area from 0.05 in LP, PI and HD

# LP/configs/cifar100_l2p.py:25-45, 99-122
_LP = {
  "epochs": 5,
  "batch_size": 128,  # 8 devices x 16
  "compute_dtype": "float32",
  "optim": recipes.optim("adam", 0.015, clip_norm=1.0),  # 0.03 · 128 / 256
  "method": {"pool_size": 10, "length": 10, "top_n": 4, "pull": 1.0},
  "head": {"start": "zero"},  # LP/models/vit.py:472-475
  "input": _PIXELS,
  "weights": {"tag": "orig_in21k"},  # LP/README "Getting pretrained"
  "tasks": {"order": "natural", "split": "full"},  # rand_seed = -1
}

# exceptions, beside those of common/recipes.py:
# - all three codes let the batch vote; here each sample chooses, unless method.batchwise is set
# - LP and HD let all classes be predicted at test time; here, and in PI, only those seen so far
# - CIFAR-100: LP clips by the norm of all gradients, those of the frozen ViT among them
#   (LP/train_continual.py:308-313), which it computes and never applies. Here by the norm
#   of those that are trained, so steps are clipped less
# - CIFAR-100: LP resizes without antialiasing, bilinearly at test time too (here bicubic), and
#   compresses training images as JPEG once more (LP/libml/input_pipeline.py:430-465)
# - ImageNet-R, CUB-200: PI and HD draw prompts and keys from U(-1, 1), here it is LP's U(0, 0.01);
#   and they put prompts under resized position embeddings
# - CUB-200: HD reads the class token unless told otherwise, here the prompts' outputs
# - DomainNet: there are no settings; as suggested, CIFAR-100's
OFFICIAL = {
  "cifar100": _LP,
  # PI/exps/l2p_inr.json, which is SD/exps/l2p_inr.json too; PI/models/l2p.py does not clip
  "imagenet_r": {
    "epochs": 10,
    "batch_size": 32,
    "compute_dtype": "float32",
    "optim": recipes.optim("adam", 0.001875),
    "method": {"pool_size": 10, "length": 5, "top_n": 5, "pull": 0.1},
    "head": {"start": "truncated_normal"},  # PI/backbone/vit_l2p.py:519-524
    "input": _PIXELS,
    "weights": {"tag": "augreg_in21k_ft_in1k"},  # timm 0.6.12's, PI/README:134
    "tasks": {"order": "shuffled", "split": "slice80"},
  },
  # HD/configs/cub_l2p.py: its rate falls every 30 epochs, after the last
  "cub200": {
    "epochs": 5,
    "batch_size": 24,  # of one device
    "compute_dtype": "float32",
    "optim": recipes.optim("adam", 0.0028125, clip_norm=1.0),  # 0.03 · 24 / 256
    "method": {"pool_size": 10, "length": 5, "top_n": 4, "pull": 0.1},
    "head": {"start": "truncated_normal"},  # HD/vits/dp_vision_transformer.py:651-656
    "input": _PIXELS,
    "weights": {"tag": "orig_in21k"},
    "tasks": {"order": "natural", "split": "full"},
  },
  "domainnet": _LP,
}
