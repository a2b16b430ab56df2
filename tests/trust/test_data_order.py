"""Which image comes when is a function of seed, task and step: not of who decodes it."""

import dataclasses

import numpy as np
import pytest

from fmlora_jax.input import order, resident, streaming

NUM, BATCH, EPOCHS = 37, 8, 3
STEPS = -(-NUM // BATCH)
CHUNKS = order.Chunks(
  num=NUM,
  batch_size=BATCH,
  width=BATCH,
  seed=1993,
  task=1,
  bounds=order.bounds(0, EPOCHS * STEPS, 4, 0),
  size=4,
)


@dataclasses.dataclass(frozen=True)
class Numbered:
  """A `Source.decode` whose images show the number of their record; processes can have it."""

  canvas: tuple[int, int]

  def __call__(self, rows):
    images = np.broadcast_to(rows[:, None, None, None], (len(rows), *self.canvas, 3))
    return images.astype(np.uint8), np.full((len(rows), 2), self.canvas, np.int32)


@pytest.fixture
def sequence(make_lab):
  made = make_lab(method={"name": "linear_probe"}).sequence
  decode = Numbered(made.source.canvas)
  return dataclasses.replace(made, source=dataclasses.replace(made.source, decode=decode))


def seen(sequence, count=1, workers=0) -> list[int]:
  """Returns the records in the order in which `count` processes together train on them."""
  indices = np.arange(100, 100 + NUM)
  parts = [
    streaming.StreamingReader(
      sequence=sequence,
      indices=indices,
      put=lambda examples: examples,
      shard=resident.ProcessShard(index, count),
      workers=workers,
    ).read(CHUNKS)
    for index in range(count)
  ]
  records = []
  for shares in zip(*parts, strict=True):
    images = np.concatenate([examples.images[:, 0, 0, 0] for examples, _ in shares])
    rows = shares[0][1]
    assert all((other == rows).all() for _, other in shares)
    records += images[rows[rows >= 0]].tolist()
  return records


def expected() -> list[int]:
  epochs = [order.epoch_indices(NUM, BATCH, 1993, 1, epoch) for epoch in range(EPOCHS)]
  return [100 + int(row) for epoch in epochs for row in epoch.ravel() if row >= 0]


def test_each_epoch_shows_each_image_once():
  epochs = np.reshape(expected(), (EPOCHS, NUM))
  assert (np.sort(epochs) == np.arange(100, 100 + NUM)).all()
  assert (epochs[0] != epochs[1]).any()
  print(f"{EPOCHS}/{EPOCHS} epochs are permutations")


def test_any_number_of_processes_sees_the_same_sequence(sequence):
  same = [seen(sequence, count) == expected() for count in (1, 2, 4)]
  print(f"processes 1, 2, 4: {sum(same)}/3 the same sequence")
  assert all(same)


@pytest.mark.tier(2)
def test_any_number_of_workers_sees_the_same_sequence(sequence):
  same = [seen(sequence, workers=workers) == expected() for workers in (0, 1, 2)]
  print(f"workers 0, 1, 2: {sum(same)}/3 the same sequence")
  assert all(same)
