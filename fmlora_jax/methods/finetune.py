"""Sequential fine-tuning of the whole ViT: the lower bound on forgetting. Source: baseline."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from fmlora_jax import config as config_lib
from fmlora_jax.methods.common import base, recipes
from fmlora_jax.methods.common.base import AdaptedViT
from fmlora_jax.types import Adapters, Facts, Params, Rules, Variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(config_lib.MethodConfig):
  """Fine-tuning has no settings: `optim.learning_rate` is the ViT's."""

  name: str = "finetune"


# both sources mask the logits of other tasks, as `heads.local_losses` does
_CODA = {  # "FT++": CO/configs/cifar-100_ft.yaml, CO/learners/default.py:316-334
  "epochs": 20,
  "batch_size": 128,
  "compute_dtype": "float32",
  "head": {"start": "torch_linear"},  # CO/models/zoo.py:374
  "optim": recipes.optim("adam", 5e-5, schedule="coda_cosine"),  # CO/utils/schedulers.py
  # CO/dataloaders/utils.py:28-65
  "input": {"augmentation": "coda_uncropped", "normalisation": "zero_one"},
  "weights": {"tag": "augreg_in21k_ft_in1k"},  # CO/models/zoo.py:368-371 with timm 0.4.12
  "tasks": {"split": "full"},
}
_PILOT = {  # PI/exps/finetune*.json, PI/models/finetune.py:137-140
  "epochs": 20,
  "batch_size": 128,
  "compute_dtype": "float32",
  "head": {"start": "kaiming_uniform"},  # PI/backbone/linears.py:27-29
  "optim": recipes.optim("sgd", 1e-3, weight_decay=2e-4, head_weight_decay=2e-4),
  "input": {"augmentation": "pilot", "normalisation": "zero_one"},
  "weights": {"tag": "augreg_in21k_ft_in1k"},  # timm 0.6.12's vit_base_patch16_224
}
# exceptions, beside those of common/recipes.py:
# - ImageNet-R: PI's weight decay is 5e-4 in the first task, and 2e-4 from the second on
# - CIFAR-100: the class order; CO keeps the data's for seed 0, and has Python's shuffle for others
# - CUB-200: there are no settings; ImageNet-R's
# - DomainNet: there are no settings; CIFAR-100's, with 5 epochs and the crops that CO has there
OFFICIAL = {
  "imagenet_r": _PILOT | {"tasks": {"split": "slice80"}},
  "cifar100": _CODA,
  "cub200": _PILOT | {"tasks": {"split": "full"}},
  "domainnet": _CODA
  | {"epochs": 5, "input": {"augmentation": "coda", "normalisation": "zero_one"}},
}


@dataclasses.dataclass(frozen=True, eq=False)
class Finetune(AdaptedViT[Config]):
  """Full fine-tuning: `shared` holds a copy of the ViT, which every task trains."""

  def init(self, key: PRNGKeyArray, weights: Params) -> Variables:
    # a copy: the pre-trained weights outlive the training state, which is donated
    copy = jax.tree.map(jnp.array, weights)
    return super().init(key, weights).update(shared={"backbone": copy})

  def freeze(self, weights: Params, variables: Variables) -> Params:
    del weights, variables
    return {}

  def trunk(self, variables: Variables) -> Params:
    return variables.shared["backbone"]

  def folded(self, weights: Params, variables: Variables) -> tuple[Params, Adapters]:
    del weights
    return variables.shared["backbone"], Adapters()

  def rules(self, task: int) -> Rules:
    return (("shared/backbone/.*", "adapter"), *super().rules(task))

  def stored(self, facts: list[Facts]) -> dict[str, Any]:
    weights = jax.eval_shape(self.backbone.init, jax.random.key(0))
    return super().stored(facts) | {"shared": base.num_parameters(weights)}


METHOD = Finetune
