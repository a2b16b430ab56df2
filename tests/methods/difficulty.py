"""Halves of the digits of growing difficulty: as they are for task 1, harder for task 2."""

import dataclasses
import functools

import numpy as np
from PIL import Image

from fmlora_jax.tasks.benchmarks import digits
from fmlora_jax.tasks.sequence import DataSource, Task, TaskSequence
from fmlora_jax.types import TaskView

FAMILIES = {  # family -> five levels, the first is no change
  "rotation": (0, 25, 45, 65, 90),  # degrees
  "overlap": (0.0, 0.2, 0.3, 0.4, 0.5),  # share of an image of another class
  "labels": (0.0, 0.15, 0.3, 0.5, 0.8),  # share of labels drawn anew
  "noise": (0, 50, 90, 140, 220),  # standard deviation, of 255
}
SIDE = 32


def render(image: np.ndarray, other: np.ndarray, family: str, level: float, seed: int):
  """Returns an 8 x 8 image enlarged and made harder."""
  large = digits.enlarge(image, SIDE)
  if family == "rotation":
    return large.rotate(level, Image.Resampling.BICUBIC)
  if family == "overlap":
    return Image.blend(large, digits.enlarge(other, SIDE), level)
  if family == "noise":
    noise = np.random.RandomState(seed).normal(0.0, level, (SIDE, SIDE))
    return Image.fromarray(np.clip(np.rint(np.asarray(large) + noise), 0, 255).astype(np.uint8))
  return large


@functools.cache
def halves(family: str = "rotation", level: float = 0, seed: int = 0) -> TaskSequence:
  """Returns half of the digits as they are, and the other half at a level of a family."""
  pixels, labels = digits.load()
  count, rng = len(labels), np.random.default_rng(seed)
  parts = np.array_split(rng.permutation(count), 2)
  others = rng.permutation(count)
  for _ in range(20):  # another class for each
    same = labels[others] == labels
    others[same] = rng.integers(0, count, same.sum())

  def decode(rows):
    images = []
    for row in rows:
      record = int(row) % count
      hard = family if row >= count else ""
      images.append(render(pixels[record], pixels[others[record]], hard, level, record))
    return digits.pack(images, SIDE)

  second = labels.copy()
  if family == "labels":
    drawn = rng.random(count) < level
    second[drawn] = rng.integers(0, 10, drawn.sum())
  tasks = []
  for index, half in enumerate(parts):
    train, val, test = np.split(half + index * count, [630, 720])
    name = f"half {index}"
    tasks.append(Task(index=index, name=name, train=train, val=val, test=test, lo=0, hi=10))
  both = np.concatenate([labels, second])
  source = DataSource(
    name="halves",
    labels=both,
    class_names=digits.CLASS_NAMES,
    canvas=(SIDE, SIDE),
    decode=decode,
    digest="0" * 64,
  )
  return TaskSequence(
    source=source,
    tasks=tuple(tasks),
    scenario="dil",
    class_order=list(range(10)),
    labels=both,
    split_id="halves",
    manifest_sha256="0" * 64,
  )


def resampled(view: TaskView, num: int, seed: int) -> TaskView:
  """Returns a view whose `num` validation images are drawn with replacement."""
  drawn = np.random.default_rng(seed).integers(0, num, num)
  assert view.val_batches is not None
  read = view.val_batches

  def val_batches(epoch):
    for examples, rows in read(epoch):
      rows = np.asarray(rows)
      yield examples, np.where(rows >= 0, drawn[rows], rows).astype(rows.dtype)

  return dataclasses.replace(view, val_batches=val_batches)


def spearman(first, second) -> float:
  """Returns Spearman's rank correlation; ties have their mean rank."""
  from scipy import stats

  return float(stats.spearmanr(first, second).statistic)
