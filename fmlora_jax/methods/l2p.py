"""L2P: a pool of prompts, of which each sample sees those whose keys are nearest to its query.

Source: Wang et al., Learning to Prompt for Continual Learning, arXiv:2112.08654; settings from the
official JAX code (LP), LAMDA-PILOT (PI) and HiDe-Prompt (HD).

On purpose unlike the public codes: by default each sample has its own prompts, also at test time,
where they let the batch vote, whose images are of one task (`batchwise` brings the vote back); no
position is added to prompts, and none of the image's is moved, where the PyTorch ports resize the
position embeddings; prompts start in [0, 0.01), as in LP, and not in [-1, 1), as in the ports.
"""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange

from fmlora_jax import config as config_lib
from fmlora_jax.methods.common import base, recipes
from fmlora_jax.models import heads, prompts
from fmlora_jax.types import Adapters, Backbone, Method, SequenceSpec, Variables


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


def make(config: config_lib.Config, backbone: Backbone, spec: SequenceSpec) -> Method:
  """Returns L2P as a Method; its features are the mean of the prompts' outputs."""
  settings, width = config.method, backbone.sizes.width

  def init(key, weights):
    del weights
    draw = jax.nn.initializers.uniform(0.01)  # LP/models/vit.py:381
    key_prompt, key_key = jax.random.split(key)
    pool = {
      "prompt": draw(key_prompt, (settings.pool_size, settings.length, width)),
      "key": draw(key_key, (settings.pool_size, width)),
    }
    return Variables(frozen={}, shared={"pool": pool}, cur={}, mem={})

  def match(pool, query):
    """Returns the similarities of all keys [B, M] and the numbers of the chosen ones [B, N]."""
    similarities = prompts.similarity(query, pool["key"])
    return similarities, prompts.choose(similarities, settings.top_n, batchwise=settings.batchwise)

  def recall(pool, query):
    _, chosen = match(pool, query)
    return Adapters(prompt=rearrange(pool["prompt"][chosen], "b n p d -> b (n p) d"))

  def penalty(variables, inputs, features):
    """Pulls the chosen keys to their queries: arXiv:2112.08654 Sec. 4.3."""
    del features
    similarities, chosen = match(variables.shared["pool"], inputs.query)
    pulled = jnp.take_along_axis(similarities, chosen, axis=1).sum(1)
    return -settings.pull * heads.weighted_mean(pulled, inputs.valid)

  def read(trunk, images, adapted):
    tokens = backbone.tokens(trunk, images, adapted, 1 + adapted.prompt.shape[1])
    return tokens[:, 1:].astype(jnp.float32).mean(1)

  def stored(facts):
    each = settings.pool_size * (settings.length + 1) * width
    return {"shared": each, "per_task": [0] * len(facts)}

  return base.with_head(
    config,
    backbone,
    spec,
    init=init,
    adapters=lambda variables, inputs: recall(variables.shared["pool"], inputs.query),
    penalty=penalty,
    folded=lambda weights, variables: (weights, variables.shared["pool"]),
    recall=recall,
    query="always",
    read=read,
    rules=lambda task: (("shared/pool/.*", "adapter"),),
    stored=stored,
    caveats=(base.BATCH_VOTE,) if settings.batchwise else (),
  )


_PIXELS = {"augmentation": "pilot", "normalisation": "zero_one"}  # area from 0.05 in LP, PI and HD

# LP/configs/cifar100_l2p.py:25-45, 99-122; LP also squashes images to squares
_LP = {
  "epochs": 5,
  "batch_size": 128,  # 8 devices x 16
  "compute_dtype": "float32",
  "optim": recipes.optim("adam", 0.015, clip_norm=1.0),  # 0.03 · 128 / 256
  "method": {"pool_size": 10, "length": 10, "top_n": 4, "pull": 1.0},
  "input": _PIXELS,
  "weights": {"tag": "orig_in21k"},  # LP/README "Getting pretrained"
  "tasks": {"order": "natural", "split": "full"},  # rand_seed = -1
}

# all three codes let the batch vote; here each sample chooses unless method.batchwise is set
OFFICIAL = {
  "cifar100": _LP,
  # PI/exps/l2p_inr.json, which is SD/exps/l2p_inr.json too; PI/models/l2p.py does not clip
  "imagenet_r": {
    "epochs": 10,
    "batch_size": 32,
    "compute_dtype": "float32",
    "optim": recipes.optim("adam", 0.001875),
    "method": {"pool_size": 10, "length": 5, "top_n": 5, "pull": 0.1},
    "input": _PIXELS,
    "weights": {"tag": "augreg_in21k_ft_in1k"},  # timm 0.6.12's, PI/README:134
    "tasks": {"order": "shuffled", "split": "slice80"},
  },
  # HD/configs/cub_l2p.py: its rate falls every 30 epochs, after the last; it reads the class token
  # unless told otherwise, and has the published cut of 30 images a class
  "cub200": {
    "epochs": 5,
    "batch_size": 24,  # of one device
    "compute_dtype": "float32",
    "optim": recipes.optim("adam", 0.0028125, clip_norm=1.0),  # 0.03 · 24 / 256
    "method": {"pool_size": 10, "length": 5, "top_n": 4, "pull": 0.1},
    "input": _PIXELS,
    "weights": {"tag": "orig_in21k"},
    "tasks": {"order": "natural", "split": "full"},
  },
  "domainnet": _LP,  # no official settings; as suggested, CIFAR-100's with 5 epochs
}
