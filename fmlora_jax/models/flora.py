"""F-LoRA: the weight changes of all tasks, between bases that the tasks share.

Source: FM-LoRA (arXiv:2504.08823) Sec. 3.2, Eq. (1-10). For row vectors, y = x·W, of each target:
  W_t = W_0 + Σ_{i≤t} dW_i,  dW_i = A·M_i·N_iᵀ·Bᵀ                       Eq. (1-2)
M_i and N_i are r_i x r_i and meet r_i columns of A and of B, whose spans hold the column and row
space of dW_i, Eq. (3-4). A and B are trained in task 1 alone. The past is one core,
W_0 + A·(Σ_i M_i·N_iᵀ)·Bᵀ, and costs no more with more tasks.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from fmlora_jax.models import low_rank
from fmlora_jax.models.rank_selector import mask_core
from fmlora_jax.types import LowRank, Params, Sizes

Order = dict[str, tuple[Int[Array, "L R"], Int[Array, "L R"]]]  # columns of A and of B by target


class FLoRA(nn.Module):
  """The bases and cores of all targets; its collections are the groups of `Variables`.

  shared: bases/TARGET/a [L, D_in, R] and b [L, D_out, R], normal, with columns of expected norm 1.
  cur: core/TARGET/m and n [L, r, r] of the current task: M = I and N = 0 at the start, so that
    dW = 0 and N has a gradient at once.
  mem: cores/TARGET [T, L, R, R], scale·M_i·N_iᵀ of each task in the rows and columns of A and B
    that it uses; zero elsewhere and before.

  Attributes:
    targets: the adapted projections.
    sizes: of the ViT.
    max_rank: R, columns of the bases.
    num_tasks: T.
    zero: the factor that is 0 at the start of task 1: n, or b with M = N = I, as in LoRA.
    alpha: numerator of the scale alpha / r of dW; None is a scale of 1.
    columns: those that a task of rank r uses: the leading r, or the r with the least energy in the
      cores of earlier tasks ("free", ours).
  """

  targets: tuple[str, ...]
  sizes: Sizes
  max_rank: int
  num_tasks: int
  zero: Literal["n", "b"] = "n"
  alpha: float | None = None
  columns: Literal["leading", "free"] = "leading"

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
    return between(bases, self.products(core), self.order())

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

  def start(self, bases: Params) -> tuple[Params, Params]:
    """Returns the bases and the core that task 1 starts from: dW = 0 by `zero`."""
    core = self.new_core(self.max_rank)
    if self.zero == "b":
      core = {name: {"m": c["m"], "n": c["m"]} for name, c in core.items()}
      bases = {name: {"a": ab["a"], "b": jnp.zeros_like(ab["b"])} for name, ab in bases.items()}
    return bases, core

  @jax.default_matmul_precision("highest")
  def products(self, core: Params) -> dict[str, Float[Array, "L r r"]]:
    """Returns scale·M·Nᵀ of each target."""
    return {
      name: self.scale(c["m"].shape[-1]) * (c["m"] @ jnp.swapaxes(c["n"], -1, -2))
      for name, c in core.items()
    }

  def scale(self, rank: Float[Array, ""] | int) -> Float[Array, ""] | float:
    """Returns alpha / r, with which a step changes dW as much at each rank; 1 without alpha."""
    return 1.0 if self.alpha is None else self.alpha / rank

  def masked(self, mask: Float[Array, " R"]) -> dict[str, LowRank]:
    """Returns the deltas of the current task under a rank mask; the core has rank R."""
    core, scale = self.get_variable("cur", "core"), self.scale(mask.sum())
    cores = {name: scale * mask_core(c["m"], c["n"], mask) for name, c in core.items()}
    return between(self.get_variable("shared", "bases"), cores, self.order())

  def order(self) -> Order | None:
    """Returns the columns of A and B, those first that a task takes first; None as they stand."""
    if self.columns == "leading":
      return None
    stacks = self.get_variable("mem", "cores")
    return {name: least_used(stack) for name, stack in stacks.items()}

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
    bases, order = self.get_variable("shared", "bases"), self.order()
    cores = self.products(self.get_variable("cur", "core"))
    if orthonormalise:
      deltas = between(bases, cores)
      deltas = {name: low_rank.orthonormalise(delta) for name, delta in deltas.items()}
      bases = {name: {"a": delta.a, "b": delta.b} for name, delta in deltas.items()}
      cores = {name: delta.core for name, delta in deltas.items() if delta.core is not None}
      self.put_variable("shared", "bases", bases)
    stacks = {}
    for name, stack in self.get_variable("mem", "cores").items():
      core = low_rank.pad_core(cores[name], self.max_rank)
      stacks[name] = stack.at[task].set(core if order is None else back(core, *order[name]))
    self.put_variable("mem", "cores", stacks)

  def interference(self) -> dict[str, Float[Array, "T T"]]:
    """Returns the inner products of the tasks' deltas by target, Eq. (5-7)."""
    bases, cores = self.get_variable("shared", "bases"), self.get_variable("mem", "cores")
    return {
      name: low_rank.interference(stack, bases[name]["a"], bases[name]["b"])
      for name, stack in cores.items()
    }


def between(
  bases: Params, cores: dict[str, Float[Array, "L r r"]], order: Order | None = None
) -> dict[str, LowRank]:
  """Returns cores between r columns of their bases: slices, so that small ranks are cheap."""
  deltas = {}
  for name, core in cores.items():
    rank = core.shape[-1]
    if order is None:
      a, b = (bases[name][side][..., :rank] for side in "ab")
    else:
      a, b = (
        jnp.take_along_axis(bases[name][side], columns[:, None, :rank], axis=-1)
        for side, columns in zip("ab", order[name], strict=True)
      )
    deltas[name] = LowRank(a=a, b=b, core=core)
  return deltas


def least_used(
  stack: Float[Array, "T L R R"],
) -> tuple[Int[Array, "L R"], Int[Array, "L R"]]:
  """Returns the columns of A and of B by their energy in the tasks' cores, the least first."""
  energy = jnp.sum(stack**2, axis=0)
  return jnp.argsort(energy.sum(-1), axis=-1), jnp.argsort(energy.sum(-2), axis=-1)


def back(
  core: Float[Array, "L R R"], rows: Int[Array, "L R"], columns: Int[Array, "L R"]
) -> Float[Array, "L R R"]:
  """Returns a core whose row i and column j stand where `rows[i]` and `columns[j]` say."""
  to_row, to_column = (jnp.argsort(order, axis=-1) for order in (rows, columns))
  core = jnp.take_along_axis(core, to_row[:, :, None], axis=-2)
  return jnp.take_along_axis(core, to_column[:, None, :], axis=-1)
