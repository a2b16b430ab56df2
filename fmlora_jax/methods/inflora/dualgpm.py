"""DualGPM: the space that a layer's inputs spanned in earlier tasks, or the free space if smaller.

Inputs come as their uncentred second moment E[x·xᵀ]. A task adds the leading left singular vectors
of the part of its moment that the memory does not span, until the rest of the moment is small.
"Small" is a share of the squared singular values of the *moment*, which are eigenvalues and so
squared singular values of the inputs already: a threshold counts fourth powers here, and takes
fewer directions than the same number in GPM, which decomposes the inputs themselves. The published
thresholds were chosen with it.

NumPy on the host, in float64: a projection must hold where eigenvalues span seven decades.

Source: GPM (arXiv:2103.09762), Sec. 4; DualGPM as InfLoRA (arXiv:2404.00228) uses it, Sec. 3.3;
public code IL/methods/inflora.py:321-412. IL marks a layer `retain` whose first task spans half of
the space or more, but stores the spanned half; here it is the free one.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from fmlora_jax.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subspace:
  """The memory of one layer.

  Attributes:
    basis: orthonormal columns, float64.
    retains: whether they span the space that earlier tasks left free ("retain" in the official
      code), not the one that their inputs spanned ("remove").
  """

  basis: Float[np.ndarray, "D k"]
  retains: bool

  @property
  def num_spanned(self) -> int:
    """Dimension of the space of the earlier tasks' inputs."""
    width, columns = self.basis.shape
    return width - columns if self.retains else columns

  def free_part(self, matrix: Float[np.ndarray, "D n"]) -> Float[np.ndarray, "D n"]:
    """Returns the matrix with its columns projected on the free space."""
    inside = self.basis @ (self.basis.T @ matrix)
    return inside if self.retains else matrix - inside


def leading(
  space: Subspace, moment: Float[np.ndarray, "D D"], rank: int
) -> Float[np.ndarray, "D r"]:
  """Returns the leading left singular vectors of the free part of a task's moment.

  Where it has fewer than `rank` the other columns are 0: the official code fills them with
  arbitrary directions, which may be those of earlier tasks. Source: InfLoRA Sec. 3.2 and 3.3.
  """
  vectors, values, _ = np.linalg.svd(space.free_part(moment))
  rounding = len(moment) * np.finfo(moment.dtype).eps * np.linalg.norm(moment)
  return vectors[:, :rank] * (values[:rank] > rounding)


def update(
  space: Subspace, moment: Float[np.ndarray, "D D"], threshold: float, *, dual: bool
) -> Subspace:
  """Returns the memory after a task.

  The leading directions of the free part are taken while more than 1 - threshold of the moment's
  squared singular values is still free. Source: GPM Eq. (5), (8), (9) and their duals.

  Args:
    space: before the task; of a first task one without columns.
    moment: of the inputs of the task's images, after it was learned; float64.
    threshold: share of the squared singular values, in (0, 1).
    dual: whether to store the free space once more than half is spanned; False is GPM.
  """
  vectors, values, _ = np.linalg.svd(space.free_part(moment))
  still_free = np.cumsum(values[::-1] ** 2)[::-1] / np.sum(moment**2)
  count = int(np.sum(still_free > 1 - threshold))
  if not space.num_spanned:
    # as in the official code: without the direction that reaches the threshold
    count = max(count - 1, 1)
  taken, basis = vectors[:, :count], space.basis
  if space.retains:
    return Subspace(basis=basis @ _complement(basis.T @ taken), retains=True)
  basis = np.hstack([basis, taken])
  width, columns = basis.shape
  if dual and columns > width / 2:
    return Subspace(basis=_complement(basis), retains=True)
  return Subspace(basis=basis, retains=False)


def _complement(columns: Float[np.ndarray, "D k"]) -> Float[np.ndarray, "D m"]:
  """Returns an orthonormal basis of the complement of independent columns."""
  return np.linalg.qr(columns, mode="complete")[0][:, columns.shape[1] :]


def empty(depth: int, width: int) -> Params:
  """Returns the memory of all layers before the first task, as arrays of a fixed shape."""
  return {
    "basis": jnp.zeros((depth, width, width)),
    "columns": jnp.zeros(depth, jnp.int32),
    "retains": jnp.zeros(depth, bool),
  }


def pack(spaces: list[Subspace]) -> Params:
  """Returns the memory of all layers as arrays: float32 bases, padded with columns of 0."""
  padded = [np.pad(s.basis, ((0, 0), (0, s.basis.shape[0] - s.basis.shape[1]))) for s in spaces]
  return {
    "basis": jnp.asarray(np.stack(padded), jnp.float32),
    "columns": jnp.asarray([s.basis.shape[1] for s in spaces], jnp.int32),
    "retains": jnp.asarray([s.retains for s in spaces], bool),
  }


def unpack(packed: Params) -> list[Subspace]:
  """Inverse of `pack` but for float32's rounding; orthonormal in float64 again."""
  bases, columns, retains = (np.asarray(packed[n]) for n in ("basis", "columns", "retains"))
  return [
    Subspace(basis=np.linalg.qr(basis[:, :count].astype(np.float64))[0], retains=bool(retained))
    for basis, count, retained in zip(bases, columns, retains, strict=True)
  ]
