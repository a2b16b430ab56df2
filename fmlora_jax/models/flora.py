"""F-LoRA: the weight changes of all tasks, between bases that the tasks share.

Source: FM-LoRA (arXiv:2504.08823) Sec. 3.2, Eq. (1-10). For row vectors, y = x·W, of each target:
  W_t = W_0 + Σ_{i≤t} dW_i,  dW_i = A·M_i·N_iᵀ·Bᵀ                       Eq. (1-2)
M_i and N_i are r_i x r_i and meet the leading r_i columns of A and B, whose spans hold the column
and row space of dW_i, Eq. (3-4). A and B are trained in task 1 alone. The past is one core,
W_0 + A·(Σ_i M_i·N_iᵀ)·Bᵀ, and costs no more with more tasks.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from fmlora_jax.models import low_rank
from fmlora_jax.models.rank_selector import mask_core
from fmlora_jax.types import LowRank, Params, Sizes


class FLoRA(nn.Module):
  """The bases and cores of all targets; its collections are the groups of `Variables`.

  shared: bases/TARGET/a [L, D_in, R] and b [L, D_out, R], normal, with columns of expected norm 1.
  cur: core/TARGET/m and n [L, r, r] of the current task: M = I and N = 0 at the start, so that
    dW = 0 and N has a gradient at once.
  mem: cores/TARGET [T, L, R, R], M_i·N_iᵀ of each task in the upper left corner; zero before.

  Attributes:
    targets: the adapted projections.
    sizes: of the ViT.
    max_rank: R, columns of the bases.
    num_tasks: T.
  """

  targets: tuple[str, ...]
  sizes: Sizes
  max_rank: int
  num_tasks: int

  @nn.compact
  def __call__(
    self, rank: int | None = None, key: PRNGKeyArray | None = None
  ) -> dict[str, LowRank]:
    """Returns the deltas of the current task, Eq. (2).

    Args:
      rank: r of the core; `init` alone needs it.
      key: of the bases; `init` alone needs it.
    """
    bases = self.variable("shared", "bases", self.new_bases, key).value
    core = self.variable("cur", "core", self.new_core, rank).value
    self.variable("mem", "cores", self.no_cores)
    return between(bases, products(core))

  def new_bases(self, key: PRNGKeyArray) -> Params:
    bases = {}
    for i, name in enumerate(self.targets):
      keys = jax.random.split(jax.random.fold_in(key, i))
      bases[name] = {
        side: low_rank.random_factor(key, self.sizes.depth, width, self.max_rank)
        for side, key, width in zip("ab", keys, self.sizes.projection(name), strict=True)
      }
    return bases

  def new_core(self, rank: int) -> Params:
    shape = self.sizes.depth, rank, rank
    eye = jnp.broadcast_to(jnp.eye(rank), shape)
    return {name: {"m": eye, "n": jnp.zeros(shape)} for name in self.targets}

  def no_cores(self) -> dict[str, Float[Array, "T L R R"]]:
    shape = self.num_tasks, self.sizes.depth, self.max_rank, self.max_rank
    return {name: jnp.zeros(shape) for name in self.targets}

  def masked(self, mask: Float[Array, " R"]) -> dict[str, LowRank]:
    """Returns the deltas of the current task under a rank mask; the core has rank R."""
    core = self.get_variable("cur", "core")
    cores = {name: mask_core(c["m"], c["n"], mask) for name, c in core.items()}
    return between(self.get_variable("shared", "bases"), cores)

  def past(self) -> dict[str, LowRank]:
    """Returns the sum of the deltas of all learned tasks, Eq. (1)."""
    cores = {name: stack.sum(0) for name, stack in self.get_variable("mem", "cores").items()}
    return between(self.get_variable("shared", "bases"), cores)

  def commit(self, task: int, orthonormalise: bool) -> None:
    """Writes the core of the current task to `mem`.

    Args:
      task: t, from 0.
      orthonormalise: whether the bases become orthonormal, their columns sorted by their weight in
        the task's delta, which stays as it is; while there are no cores of other tasks.
    """
    bases, cores = self.get_variable("shared", "bases"), products(self.get_variable("cur", "core"))
    if orthonormalise:
      deltas = between(bases, cores)
      deltas = {name: low_rank.orthonormalise(delta) for name, delta in deltas.items()}
      bases = {name: {"a": delta.a, "b": delta.b} for name, delta in deltas.items()}
      cores = {name: delta.core for name, delta in deltas.items() if delta.core is not None}
      self.put_variable("shared", "bases", bases)
    stacks = {
      name: stack.at[task].set(low_rank.pad_core(cores[name], self.max_rank))
      for name, stack in self.get_variable("mem", "cores").items()
    }
    self.put_variable("mem", "cores", stacks)

  def interference(self) -> Float[Array, "T T"]:
    """Returns the cosines between the tasks' deltas, Eq. (5-7): their mean over targets."""
    bases, cores = self.get_variable("shared", "bases"), self.get_variable("mem", "cores")
    cosines = [
      low_rank.cosine(low_rank.interference(stack, bases[name]["a"], bases[name]["b"]))
      for name, stack in cores.items()
    ]
    return jnp.mean(jnp.stack(cosines), axis=0)


def between(bases: Params, cores: dict[str, Float[Array, "L r r"]]) -> dict[str, LowRank]:
  """Returns cores between the leading columns of their bases: slices, so small ranks are cheap."""
  deltas = {}
  for name, core in cores.items():
    a, b = (bases[name][side][..., : core.shape[-1]] for side in "ab")
    deltas[name] = LowRank(a=a, b=b, core=core)
  return deltas


@jax.default_matmul_precision("highest")
def products(core: Params) -> dict[str, Float[Array, "L r r"]]:
  """Returns M·Nᵀ of each target."""
  return {name: c["m"] @ jnp.swapaxes(c["n"], -1, -2) for name, c in core.items()}
