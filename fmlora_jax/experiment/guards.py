"""Run-time guards: frozen arrays never change, saved arrays are finite."""

from collections.abc import Callable, Mapping

import jax
import numpy as np
from jaxtyping import Array

from fmlora_jax.train.labels import label_leaves, partition
from fmlora_jax.types import FrozenError, NonFiniteError, Params, Rules
from fmlora_jax.workdir import digest


class FrozenGuard:
  """Compares digests of frozen arrays at the start and at the end of their time.

  The pre-trained weights are frozen for the whole session; leaves that the rules of a task call
  frozen, while it is trained: between tasks the method may write them.

  Args:
    weights: the pre-trained backbone.
    rules: of `Method`.
  """

  def __init__(self, weights: Params, rules: Callable[[int], Rules]):
    self._weights, self._rules = weights, rules
    self._weights_before = self._digest_weights()
    self._params_before: dict[str, str] = {}

  def begin(self, index: int, params: Params) -> None:
    """Digests the frozen leaves of {"shared", "cur"} at the start of task `index`."""
    self._params_before = self._digest_params(index, params)

  def check(self, index: int, params: Params) -> None:
    """Compares the frozen arrays with their digests.

    Raises:
      FrozenError: with the name of the first leaf that has changed.
    """
    before = self._weights_before | self._params_before
    now = self._digest_weights() | self._digest_params(index, params)
    names = sorted(before.keys() | now.keys())
    if changed := [name for name in names if before.get(name) != now.get(name)]:
      name = changed[0]
      raise FrozenError(
        f"{name} is frozen and has changed in task {index + 1}, from {before.get(name)} to "
        f"{now.get(name)} ({len(changed)} of {len(before)} frozen leaves have): a bug in the "
        "method's rules, the optimizer or the memory; nothing of this task is saved"
      )

  def _digest_weights(self) -> dict[str, str]:
    return digest.tree_digests({"weights": self._weights})

  def _digest_params(self, index: int, params: Params) -> dict[str, str]:
    _, frozen = partition(params, label_leaves(params, self._rules(index)))
    return digest.tree_digests(frozen)


def require_finite(arrays: Mapping[str, Array], when: str) -> None:
  """Refuses to save arrays that are not finite.

  Args:
    arrays: by name, replicated on all devices.
    when: for the message, such as "after task 2".

  Raises:
    NonFiniteError: with the name of the first array that holds NaN or infinity.
  """
  hosted = jax.device_get(dict(arrays))
  bad = sorted(name for name, array in hosted.items() if not np.isfinite(array).all())
  if bad:
    raise NonFiniteError(
      f"{bad[0]} holds NaN or infinity {when} (as do {len(bad) - 1} other arrays): it is not "
      "saved; lower config.optim.learning_rate or set config.optim.clip_norm"
    )
