"""What must hold of a run's arrays: what is frozen stays as it is, what is saved is finite."""

from collections.abc import Mapping

import jax
from jaxtyping import Array

from fmlora_jax.train.labels import label_leaves, partition
from fmlora_jax.train.loop import Trainer
from fmlora_jax.train.step import is_finite
from fmlora_jax.types import FrozenError, NonFiniteError, Params
from fmlora_jax.workdir import digest


class FrozenGuard:
  """Tells by their digests whether leaves that must not train have changed.

  These are the pre-trained weights, from the start of the session to its end, and what the rules
  of the method call frozen, while a task is trained; between tasks a method may write it.

  Args:
    trainer: of the run.
  """

  def __init__(self, trainer: Trainer):
    self._trainer = trainer
    self._weights = self._of_weights()
    self._begun: dict[str, str] = {}

  def begin(self, index: int, params: Params) -> None:
    """Remembers what task `index` must leave alone of {"shared", "cur"}."""
    self._begun = self._of_params(index, params)

  def check(self, index: int, params: Params) -> None:
    """Compares with the start.

    Raises:
      FrozenError: naming the first leaf that has changed.
    """
    before = self._weights | self._begun
    now = self._of_weights() | self._of_params(index, params)
    names = sorted(before.keys() | now.keys())
    if changed := [name for name in names if before.get(name) != now.get(name)]:
      name = changed[0]
      raise FrozenError(
        f"{name} is frozen and has changed in task {index + 1}, from {before.get(name)} to "
        f"{now.get(name)} ({len(changed)} of {len(before)} frozen leaves have): must stay as it "
        "was, so the method's rules, the optimiser or the memory are at fault; nothing of this is "
        "saved"
      )

  def _of_weights(self) -> dict[str, str]:
    return digest.tree_digests({"weights": self._trainer.weights})

  def _of_params(self, index: int, params: Params) -> dict[str, str]:
    _, frozen = partition(params, label_leaves(params, self._trainer.method.rules(index)))
    return digest.tree_digests(frozen)


def require_finite(arrays: Mapping[str, Array], when: str) -> None:
  """Refuses arrays that must not be saved.

  Args:
    arrays: by name, equal in all processes, of which all must call this.
    when: for the message, such as "after task 2".

  Raises:
    NonFiniteError: naming the first that holds NaN or infinity.
  """
  finite = jax.device_get({name: _is_finite(leaf) for name, leaf in arrays.items()})
  bad = sorted(name for name, ok in finite.items() if not ok)
  if bad:
    raise NonFiniteError(
      f"{bad[0]} holds NaN or infinity {when} (as do {len(bad) - 1} other arrays): it is not "
      "saved; lower config.optim.learning_rate or set config.optim.clip_norm"
    )


_is_finite = jax.jit(is_finite)
