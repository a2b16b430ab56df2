import concurrent.futures
import dataclasses
import functools
import threading

import numpy as np
import pytest

from fmlora_jax import tasks
from fmlora_jax.config import ConfigError, TasksConfig
from fmlora_jax.input import resident


@pytest.fixture(scope="module")
def made():
  return tasks.make(TasksConfig(), seed=0, source_size=8)


def test_tasks_have_arrays_of_one_shape(made):
  capacity = resident.capacity(made, "train")
  assert capacity == max(len(task.train) for task in made.tasks)
  for task in made.tasks:
    loaded = resident.load_examples(made, task.train, capacity)
    count = len(task.train)
    assert loaded.images.shape == (capacity, 8, 8, 3)
    assert loaded.valid.sum() == count
    assert not loaded.valid[count:].any()
    assert not loaded.images[count:].any()
    assert not loaded.labels[count:].any()
    assert (loaded.sizes == 8).all()
    np.testing.assert_array_equal(loaded.labels[:count], made.labels[task.train])
    np.testing.assert_array_equal(
      loaded.images[:count], made.source.decode(task.train)[0]
    )  # also where it is decoded in two chunks


def test_resident_is_chosen_where_it_fits_to_the_byte(made):
  rows = made.tasks[0].val
  loaded = resident.load_examples(made, rows, len(rows))
  parts = (loaded.images, loaded.sizes, loaded.labels, loaded.valid)
  assert sum(part.nbytes for part in parts) == resident.num_bytes(made, len(rows))
  largest = resident.capacity(made, "train") + resident.capacity(made, "val")
  device = resident.num_bytes(made, largest)
  host = resident.num_bytes(made, largest + sum(len(task.test) for task in made.tasks))
  choose = functools.partial(resident.choose_mode, made, "test")
  assert choose("auto", device=device, host=host) == "resident"
  assert choose("resident", device=device, host=host) == "resident"
  assert choose("stream", device=device, host=host) == "stream"
  for place, budget in (
    ("device", {"device": device - 1, "host": host}),
    ("host", {"device": device, "host": host - 1}),
  ):
    assert choose("auto", **budget) == choose("stream", **budget) == "stream"
    message = (
      r"config.input.mode is 'resident': \d+ images of digits, of 8 x 8 pixels, .*, "
      rf"the {place} has .*; set it to auto or stream, lower config.input.source_size"
    )
    with pytest.raises(ConfigError, match=message):
      choose("resident", **budget)


def test_where_the_device_has_no_memory_of_its_own_the_host_holds_two_tasks(made):
  largest = resident.capacity(made, "train") + resident.capacity(made, "val")
  tests = sum(len(task.test) for task in made.tasks)
  host = resident.num_bytes(made, 2 * largest + tests)
  assert resident.choose_mode(made, "test", "auto", device=None, host=host) == "resident"
  assert resident.choose_mode(made, "test", "auto", device=None, host=host - 1) == "stream"
  with pytest.raises(
    ConfigError, match=f"{2 * largest + tests} images of digits, .*, the host has"
  ):
    resident.choose_mode(made, "test", "resident", device=None, host=host - 1)


@pytest.mark.parametrize("way", ["load", "fetch"])
def test_decoding_that_nobody_wants_any_more_ends_at_the_next_chunk(made, monkeypatch, way):
  monkeypatch.setattr(resident, "CHUNK", 8)
  stop, decoded = threading.Event(), []

  def decode(rows):
    decoded.append(len(rows))
    if len(decoded) == 2:
      stop.set()
    return made.source.decode(rows)

  source = dataclasses.replace(made.source, decode=decode)
  rows = made.tasks[0].train
  with pytest.raises(concurrent.futures.CancelledError):
    if way == "load":
      resident.load_examples(dataclasses.replace(made, source=source), rows, len(rows), stop)
    else:
      resident.DecodedCache(source, rows).decode(rows, stop)
  assert decoded == [8, 8]


def test_kept_images_are_decoded_once_and_only_if_asked_for(made):
  asked = []
  decode = made.source.decode
  source = dataclasses.replace(
    made.source, decode=lambda rows: asked.extend(rows.tolist()) or decode(rows)
  )
  kept = resident.DecodedCache(source, np.arange(0, 100, 2))
  for rows in ([8, 4], [4, 6, 8, 98], [98, 4], []):
    rows = np.asarray(rows, int)
    for got, expected in zip(kept(rows), decode(rows), strict=True):
      np.testing.assert_array_equal(got, expected)
  assert asked == [8, 4, 6, 98]


def test_more_images_than_capacity_are_refused(made):
  with pytest.raises(ValueError, match="capacity is 1: must be at least"):
    resident.load_examples(made, made.tasks[0].val, 1)


def test_no_images_are_loaded_as_padding(made):
  loaded = resident.load_examples(made, np.array([], np.int64), 2)
  assert not loaded.valid.any()
