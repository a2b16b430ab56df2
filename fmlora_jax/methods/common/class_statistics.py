"""Statistics of a class, stored in place of its images: centroids of features, with variances.

A row of the statistics is a class of a task; where tasks share their classes, a class has a row in
each. They are arrays {"mean": [R, k, D], "variance": [R, k, D], "exists": [R, k]}: R rows of k
centroids at most. Source: HiDe-Prompt (arXiv:2310.07234), its multi-centroid variant.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from fmlora_jax.types import Features, Params, SequenceSpec, TaskView

Sums = tuple[Float[Array, "C D"], Float[Array, " C"]]  # of features, and numbers of images

FLOOR = 1e-4  # added to the variances of drawn features


class Rows:
  """The classes of all tasks, one after the other.

  Attributes:
    task, label: of each row, [R].
    first: row of each task's first class, [T].
  """

  def __init__(self, spec: SequenceSpec):
    sizes = [hi - lo for lo, hi in spec.class_ranges]
    self.task = np.repeat(np.arange(spec.num_tasks), sizes)
    self.label = np.concatenate([np.arange(lo, hi) for lo, hi in spec.class_ranges])
    self.first = np.cumsum([0, *sizes[:-1]])

  def __len__(self) -> int:
    return len(self.task)


def empty(num_rows: int, num_centroids: int, width: int) -> Params:
  """Returns statistics without a class."""
  zeros = jnp.zeros((num_rows, num_centroids, width))
  return {"mean": zeros, "variance": zeros, "exists": jnp.zeros((num_rows, num_centroids), bool)}


def make_collector(features: Callable[..., Features]) -> Callable:
  """Returns the function (model, view) -> features [n, D], labels [n] of the training images.

  The images are seen as at test time; `features` is a function of (model, images).
  """

  @functools.partial(jax.jit, static_argnames="center")
  def of_batch(model, examples, rows, *, center):
    batch = center(examples, rows)
    return features(model, batch.images), batch.labels, batch.valid

  def collect(model, view: TaskView):
    parts = [of_batch(model, *batch, center=view.center) for batch in view.train_batches(0)]
    gathered, labels, valid = map(np.concatenate, zip(*view.gather(parts), strict=True))
    return gathered[valid], labels[valid]

  return collect


def make_class_sums(features: Callable[..., Features], num_classes: int) -> Callable[..., Sums]:
  """Returns the function (model, view) -> sums of features [C, D], numbers of images [C].

  They are of each class in the view's training images, as at test time; `features` is a function of
  (model, images).
  """

  @functools.partial(jax.jit, static_argnames="center")
  def batch_sums(model, examples, rows, *, center):
    batch = center(examples, rows)
    one_hot = jax.nn.one_hot(batch.labels, num_classes) * batch.valid[:, None]
    sums = jnp.matmul(one_hot.T, features(model, batch.images), precision="highest")
    return sums, one_hot.sum(0)

  def class_sums(model, view: TaskView):
    totals = [batch_sums(model, *batch, center=view.center) for batch in view.train_batches(0)]
    return jax.tree.map(lambda *parts: sum(parts), *totals)

  return class_sums


def sums_of(
  features: Float[np.ndarray, "n D"], labels: Int[np.ndarray, " n"], num_classes: int
) -> Sums:
  """Returns what `make_class_sums` does, of features that are at hand."""
  one_hot = (labels == np.arange(num_classes)[:, None]).astype(np.float64)
  sums, counts = one_hot @ features.astype(np.float64), one_hot.sum(1)
  return jnp.asarray(sums, jnp.float32), jnp.asarray(counts, jnp.float32)


def add(
  statistics: Params,
  rows: Rows,
  task: int,
  features: Float[np.ndarray, "n D"],
  labels: Int[np.ndarray, " n"],
  seed: int,
) -> Params:
  """Returns `statistics` with the rows of `task` computed from the features of its images."""
  host = {name: np.array(leaf) for name, leaf in statistics.items()}
  for row in np.flatnonzero(rows.task == task):
    of_class = features[labels == rows.label[row]]
    mean, variance = centroids(of_class, host["mean"].shape[1], seed)
    host["mean"][row, : len(mean)], host["variance"][row, : len(mean)] = mean, variance
    host["exists"][row] = np.arange(host["exists"].shape[1]) < len(mean)
  return {name: jnp.asarray(leaf) for name, leaf in host.items()}


def centroids(
  features: Float[np.ndarray, "n D"], most: int, seed: int
) -> tuple[Float[np.ndarray, "c D"], Float[np.ndarray, "c D"]]:
  """Returns means and variances of K-means clusters: `most`, or one for each distinct feature."""
  from sklearn.cluster import KMeans  # scikit-learn takes a second to load and few runs need it

  num = min(most, len(np.unique(features, axis=0)))
  if num == 0:
    return features[:0], features[:0]
  # scikit-learn declares n_init as text
  means = KMeans(num, n_init=1, random_state=seed)  # pyright: ignore[reportArgumentType]
  cluster = np.asarray(means.fit(features).labels_)
  # from the labels alone: the sums inside K-means depend on its threads
  clusters = [features[cluster == i].astype(np.float64) for i in np.unique(cluster)]
  return np.stack([c.mean(0) for c in clusters]), np.stack([c.var(0) for c in clusters])


def chances(statistics: Params, wanted: Bool[Array, " R"]) -> Float[Array, "R k"]:
  """Returns the probability of drawing each centroid: equal for all centroids of wanted rows.

  Clusters without variance, which are single images, are left out, as in the public code; but not
  where a row has no other: a class that is never drawn would lose all its images to the others.
  """
  spread = statistics["exists"] & (statistics["variance"].mean(-1) > 0)
  drawn = jnp.where(spread.any(-1, keepdims=True), spread, statistics["exists"]) & wanted[:, None]
  return drawn / jnp.maximum(drawn.sum(), 1)


def draw(
  statistics: Params, chances: Float[Array, "R k"], key: PRNGKeyArray, count: int
) -> tuple[Float[Array, "count D"], Int[Array, " count"]]:
  """Returns features from N(mean, diag(variance) + 1e-4·I) of drawn centroids, and their rows."""
  key_centroid, key_noise = jax.random.split(key)
  drawn = jax.random.choice(key_centroid, chances.size, (count,), p=chances.ravel())
  row, centroid = jnp.divmod(drawn, chances.shape[1])
  mean, variance = (statistics[name][row, centroid] for name in ("mean", "variance"))
  return mean + jnp.sqrt(variance + FLOOR) * jax.random.normal(key_noise, mean.shape), row
