"""What a layer remembers of old tasks' inputs, against GPM's equations written out."""

import numpy as np
import pytest

from fmlora_jax.methods.inflora import dualgpm
from fmlora_jax.methods.inflora.dualgpm import Subspace

WIDTH = 12
EMPTY = Subspace(basis=np.zeros((WIDTH, 0)), retains=False)


def moment(seed, decay=0.7, num=400):
  """Returns E[x·xᵀ] of inputs in a random frame whose standard deviations fall by `decay`."""
  rng = np.random.default_rng(seed)
  frame = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
  x = rng.normal(size=(num, WIDTH)) * decay ** np.arange(WIDTH) @ frame.T
  return x.T @ x / num


def written_out(basis, kind, cov, threshold):
  """Returns (basis, kind) after a task, as DualGPM's equations say it for each kind of layer."""

  def squares(matrix):
    return np.linalg.svd(matrix)[1] ** 2

  width = len(cov)
  total = squares(cov).sum()
  if basis is None:
    ratios = squares(cov) / total
    k = max(int(np.sum(np.cumsum(ratios) < threshold)), 1)
    basis, kind = np.linalg.svd(cov)[0][:, :k], "remove"
  elif kind == "remove":
    outside = (np.eye(width) - basis @ basis.T) @ cov
    directions, found = np.linalg.svd(outside)[0], squares(outside)
    explained, columns = 1 - found.sum() / total, [basis]
    for i in range(width):
      if explained >= threshold:
        break
      columns.append(directions[:, [i]])
      explained += found[i] / total
    basis = np.hstack(columns)
  else:
    inside = basis @ basis.T @ cov
    directions, found = np.linalg.svd(inside)[0], squares(inside)
    residual, dropped = found.sum() / total, 0
    while residual >= 1 - threshold:
      residual -= found[dropped] / total
      dropped += 1
    gone = directions[:, :dropped]
    left = np.linalg.svd(basis - gone @ gone.T @ basis)[0]
    basis = left[:, : basis.shape[1] - dropped]
  if kind == "remove" and basis.shape[1] > width / 2:
    basis, kind = np.linalg.svd(basis)[0][:, basis.shape[1] :], "retain"
  return basis, kind


def projector(basis):
  return basis @ basis.T


def spanned(space):
  """Returns the projector on the old tasks' inputs."""
  inside = projector(space.basis)
  return np.eye(len(inside)) - inside if space.retains else inside


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("threshold", [0.9, 0.98])
def test_updates_are_those_of_the_equations(seed, threshold):
  space, (basis, kind), kinds = EMPTY, (None, None), []
  for task in range(6):
    cov, now = moment(10 * seed + task), threshold + (1 - threshold) * task / 6
    space = dualgpm.update(space, cov, now, dual=True)
    basis, kind = written_out(basis, kind, cov, now)
    assert ("retain" if space.retains else "remove") == kind
    assert space.basis.shape == basis.shape
    np.testing.assert_allclose(projector(space.basis), projector(basis), rtol=0, atol=1e-8)
    np.testing.assert_allclose(space.basis.T @ space.basis, np.eye(basis.shape[1]), atol=1e-10)
    kinds.append((kind, basis.shape[1]))
  retained = [columns for kind, columns in kinds if kind == "retain"]
  assert kinds[0][0] == "remove" and len(set(retained)) > 1  # both kinds, and columns were dropped


@pytest.mark.parametrize("dual", [True, False])
def test_what_is_spanned_grows_and_covers_each_task_to_the_threshold(dual):
  space, before = EMPTY, np.zeros((WIDTH, WIDTH))
  for task in range(6):
    cov = moment(task)
    space = dualgpm.update(space, cov, 0.95, dual=dual)
    now = spanned(space)
    assert round(np.trace(now)) == space.num_spanned
    np.testing.assert_allclose(now @ before, before, rtol=0, atol=1e-8)  # nothing is forgotten
    left = np.linalg.norm(cov - now @ cov) ** 2 / np.linalg.norm(cov) ** 2
    if task:
      assert left <= 0.05
    before = now


def test_dualgpm_remembers_what_gpm_does_in_fewer_numbers():
  dual, plain = EMPTY, EMPTY
  for task in range(6):
    dual = dualgpm.update(dual, moment(task), 0.98, dual=True)
    plain = dualgpm.update(plain, moment(task), 0.98, dual=False)
    np.testing.assert_allclose(spanned(dual), spanned(plain), rtol=0, atol=1e-8)
    assert dual.basis.shape[1] <= WIDTH / 2
  assert dual.retains and not plain.retains
  assert plain.basis.shape[1] == plain.num_spanned == dual.num_spanned > WIDTH / 2


@pytest.mark.parametrize(
  ("variances", "threshold", "columns"),
  [
    # by fourth powers 16/21, 4/21, 1/21; by squares 4/7, 2/7, 1/7 would be 0, then 1, then 2
    ((4, 2, 1), 0.5, 1),
    ((4, 2, 1), 0.8, 1),
    ((4, 2, 1), 0.96, 2),
    ((1, 1, 1), 0.3, 1),  # at least one
  ],
)
def test_a_first_task_keeps_what_stays_below_the_threshold(variances, threshold, columns):
  empty = Subspace(basis=np.zeros((3, 0)), retains=False)
  space = dualgpm.update(empty, np.diag(np.float64(variances)), threshold, dual=False)
  assert space.basis.shape == (3, columns)
  np.testing.assert_allclose(spanned(space), np.diag(np.arange(3) < columns), atol=1e-12)


def test_a_first_task_that_spans_more_than_half_leaves_its_complement():
  """The official code marks the layer so, and keeps the spanned half."""
  variances = 1.0 / np.arange(1, WIDTH + 1) ** 0.5
  space = dualgpm.update(EMPTY, np.diag(variances), 0.95, dual=True)
  assert space.retains and space.num_spanned > WIDTH / 2
  np.testing.assert_allclose(
    spanned(space), np.diag(np.arange(WIDTH) < space.num_spanned), atol=1e-12
  )


@pytest.mark.parametrize("retains", [False, True])
def test_directions_of_a_task_are_free_and_the_most_of_it(retains):
  rng = np.random.default_rng(0)
  basis = np.linalg.qr(rng.normal(size=(WIDTH, 5)))[0]
  space, cov = Subspace(basis=basis, retains=retains), moment(3)
  free = np.eye(WIDTH) - spanned(space)
  found = dualgpm.leading(space, cov, 3)
  np.testing.assert_allclose(found.T @ found, np.eye(3), atol=1e-12)
  np.testing.assert_allclose(free @ found, found, rtol=0, atol=1e-12)
  # eigenvectors of F·C·C·F are the left singular vectors of F·C
  values, vectors = np.linalg.eigh(free @ cov @ cov @ free)
  top = vectors[:, np.argsort(values)[::-1][:3]]
  np.testing.assert_allclose(projector(found), projector(top), rtol=0, atol=1e-8)


@pytest.mark.parametrize(("retains", "columns"), [(False, WIDTH - 2), (True, 2), (True, 0)])
def test_where_fewer_directions_are_free_the_others_are_zero(retains, columns):
  basis = np.linalg.qr(np.random.default_rng(1).normal(size=(WIDTH, WIDTH)))[0][:, :columns]
  space = Subspace(basis=basis, retains=retains)
  free = columns if retains else WIDTH - columns
  found = dualgpm.leading(space, moment(4), 5)
  np.testing.assert_allclose(np.linalg.norm(found, axis=0), [1.0] * free + [0.0] * (5 - free))
  np.testing.assert_allclose(spanned(space) @ found, 0 * found, rtol=0, atol=1e-12)


def test_directions_that_the_inputs_lack_are_zero_too():
  cov = np.diag(np.float64([3, 2, 1] + [0] * 9))
  found = dualgpm.leading(EMPTY, cov, 5)
  np.testing.assert_allclose(np.abs(found), np.eye(WIDTH)[:, :5] * [1, 1, 1, 0, 0], atol=1e-12)


def test_memory_survives_being_packed_into_arrays_of_one_shape():
  rng = np.random.default_rng(2)
  spaces = [
    Subspace(basis=np.linalg.qr(rng.normal(size=(WIDTH, k)))[0], retains=retains)
    for k, retains in ((0, False), (3, False), (6, True), (WIDTH, False), (0, True))
  ]
  packed = dualgpm.pack(spaces)
  empty = dualgpm.empty(len(spaces), WIDTH)
  for name, leaf in packed.items():
    assert (leaf.shape, leaf.dtype) == (empty[name].shape, empty[name].dtype)
  for before, after in zip(spaces, dualgpm.unpack(packed), strict=True):
    assert after.retains == before.retains and after.basis.shape == before.basis.shape
    assert after.basis.dtype == np.float64
    np.testing.assert_allclose(projector(after.basis), projector(before.basis), atol=1e-6)
    np.testing.assert_allclose(
      after.basis.T @ after.basis, np.eye(after.basis.shape[1]), rtol=0, atol=1e-13
    )
  assert [s.num_spanned for s in dualgpm.unpack(empty)] == [0] * len(spaces)
