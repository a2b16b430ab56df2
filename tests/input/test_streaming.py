"""Streamed images are those of a resident task, and what ends a run ends its processes."""

import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from fmlora_jax import tasks
from fmlora_jax.config import ConfigError, TasksConfig
from fmlora_jax.input import resident, streaming

ROOT = pathlib.Path(__file__).parents[2]
EPOCHS = 3
TASK = 1  # of 39 images, three batches of 16 an epoch: the last one is padded


def in_sizes(decode, rows):
  """Returns what `decode` does, cut to 8..16 pixels a side."""
  images, _ = decode(rows)
  sizes = np.stack([8 + rows % 9, 8 + rows % 7], axis=1).astype(np.int32)
  for image, (height, width) in zip(images, sizes, strict=True):
    image[height:], image[:, width:] = 0, 0
  return images, sizes


@pytest.fixture(scope="module")
def view(make_lab):
  """Returns the function (mode, workers) -> view of a task with images of different sizes."""

  @functools.cache
  def of(mode, workers=0):
    settings = {"mode": mode, "workers": workers, "augmentation": "pilot"}
    made = make_lab(method={"name": "linear_probe"}, epochs=EPOCHS, input=settings)
    decode = functools.partial(in_sizes, made.sequence.source.decode)
    source = dataclasses.replace(made.sequence.source, decode=decode)
    sequence = dataclasses.replace(made.sequence, source=source)
    return made.setup.with_sequence(sequence).views.view(TASK)

  return of


jitted = functools.cache(jax.jit)


def assert_same_batches(view, streamed, resident_batches, at_least):
  """Both are iterators of (examples, rows); compared as training and testing see them."""
  count, padded = 0, 0
  augment, center = jitted(view.augment), jitted(view.center)
  for got, expected in zip(streamed, resident_batches, strict=True):
    key = jax.random.key(count)
    for ours, theirs in (
      (augment(*got, key), augment(*expected, key)),
      (center(*got), center(*expected)),
    ):
      valid = np.asarray(theirs.valid)
      np.testing.assert_array_equal(ours.valid, valid)
      np.testing.assert_array_equal(ours.labels, theirs.labels)
      np.testing.assert_array_equal(
        np.asarray(ours.images)[valid].view(np.uint32),
        np.asarray(theirs.images)[valid].view(np.uint32),
      )
    count, padded = count + 1, padded + (not valid.all())
  assert count >= at_least and padded


def by_step(chunks):
  """Yields (examples, rows [B]) of each step of chunks."""
  for examples, rows in chunks:
    for batch in rows:
      if batch[0] >= 0:
        yield examples, batch


@pytest.mark.parametrize("part", ["train", "val"])
def test_streamed_batches_are_bit_equal_to_resident_ones(view, part):
  ours, theirs = (getattr(view(mode), f"{part}_batches") for mode in ("stream", "resident"))
  for epoch in range(EPOCHS):
    assert_same_batches(view("resident"), ours(epoch), theirs(epoch), at_least=2)
  assert {examples.images.shape for examples, _ in ours(0)} == {(16, 16, 16, 3)}  # one batch each


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_chunks_hold_the_same_steps_from_any_step_on(view, workers):
  start = 2  # a chunk has four steps: it ends one epoch and begins the next
  ours = view("stream", workers).train_chunks(start)
  theirs = view("resident").train_chunks(start)
  assert_same_batches(view("resident"), by_step(ours), by_step(theirs), at_least=3 * EPOCHS - start)
  assert not multiprocessing.active_children()


def test_a_block_is_of_bounded_size_and_one_batch_at_the_least(make_lab, monkeypatch):
  made = make_lab(method={"name": "linear_probe"})
  for num_bytes, steps in ((2**40, 4), (16 * 781 * 3, 3), (16 * 781 * 3 - 1, 2), (1, 1)):
    monkeypatch.setattr(resident, "BLOCK_BYTES", num_bytes)
    assert resident.num_bytes(made.sequence, 16) == 16 * 781
    assert resident.steps_per_block(made.sequence, 16, at_most=4) == steps


def test_no_blocks_are_no_images(make_lab):
  made = make_lab(method={"name": "linear_probe"}, input={"mode": "stream", "workers": 2})
  assert list(made.view(0).train_chunks(made.config.epochs * 2)) == []


def test_two_hosts_decode_each_image_of_a_block_once_between_them(make_lab):
  made = make_lab(method={"name": "linear_probe"})
  decoded = []
  decode = made.sequence.source.decode
  source = dataclasses.replace(
    made.sequence.source, decode=lambda rows: decoded.append(rows) or decode(rows)
  )
  sequence = dataclasses.replace(made.sequence, source=source)
  blocks = np.asarray([[[3, 0], [1, -1]], [[2, 4], [5, 6]]])

  def read(share):
    put = {"put": lambda x: x, "shard": share}
    return list(
      streaming.StreamingReader(sequence=sequence, indices=np.arange(7), **put).read(blocks)
    )

  whole = read(resident.WHOLE)
  decoded.clear()
  shares = [read(resident.ProcessShard(index, 2)) for index in range(2)]
  assert [sum(map(len, decoded)), len(np.unique(np.concatenate(decoded)))] == [7, 7]
  for block, (examples, rows) in enumerate(whole):
    parts, places = zip(*(share[block] for share in shares), strict=True)
    for place in places:
      np.testing.assert_array_equal(place, rows)
    for field, leaf in vars(examples).items():
      np.testing.assert_array_equal(np.concatenate([getattr(p, field) for p in parts]), leaf)


def test_the_next_block_is_ready_while_one_is_in_use_and_no_more_are_put(make_lab):
  made, put = make_lab(method={"name": "linear_probe"}), []
  read = streaming.StreamingReader(
    sequence=made.sequence, indices=np.arange(8), put=lambda x: put.append(x) or x
  ).read
  blocks = read(np.arange(8).reshape(4, 2))
  for count, _ in enumerate(blocks, start=1):
    deadline = time.monotonic() + 60
    while len(put) < min(count + 1, 4):  # without being asked for
      assert time.monotonic() < deadline
    assert len(put) == min(count + 1, 4)
  assert count == 4


@pytest.fixture
def folder(tmp_path):
  """Twelve images of two classes, of which 0/3.png breaks after the start of the run."""
  for label, index in itertools.product("01", range(6)):
    (tmp_path / label).mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / label / f"{index}.png")
  config = TasksConfig(benchmark="image_folder", num_tasks=1, data_dir=str(tmp_path))
  made = tasks.make(config, seed=0, source_size=8)
  (tmp_path / "0" / "3.png").write_bytes(b"no image")
  return made


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_breaks_on_the_way_is_named_and_stops_all(folder, workers):
  blocks = np.arange(12).reshape(6, 2)
  read = streaming.StreamingReader(
    sequence=folder, indices=np.arange(12), put=lambda x: x, workers=workers
  )
  seen = []
  with pytest.raises(ConfigError, match=r"^config\.tasks\.data_dir .*'0/3\.png' has changed: not"):
    seen.extend(examples.images[0, 0, 0, 0] for examples, _ in read.read(blocks))
  assert seen == [0]  # the block before it was good
  assert not multiprocessing.active_children()


def die(rows):
  os._exit(3)


def test_a_process_that_dies_is_told_with_the_setting(make_lab):
  made = make_lab(method={"name": "linear_probe"})
  source = dataclasses.replace(made.sequence.source, decode=die)
  sequence = dataclasses.replace(made.sequence, source=source)
  read = streaming.StreamingReader(
    sequence=sequence, indices=np.arange(4), put=lambda x: x, workers=1
  ).read
  with pytest.raises(
    ConfigError, match=r"config\.input\.workers is 1: .* exit code 3.*; 0 decodes in a"
  ):
    list(read(np.arange(4).reshape(2, 2)))
  assert not multiprocessing.active_children()


ENDLESS = """
import multiprocessing, signal, sys, time
from fmlora_jax import tasks
from fmlora_jax.config import TasksConfig
from fmlora_jax.input import order, streaming

def main():
  made = tasks.make(TasksConfig(), seed=0, source_size=8)
  train = made.tasks[0].train
  read = streaming.StreamingReader(sequence=made, indices=train, put=lambda x: x, workers=2).read
  bounds = tuple(range(1_000_000))
  rows = {"num": len(train), "batch_size": 8, "width": 8, "seed": 0, "task": 0}
  for _ in read(order.Chunks(**rows, bounds=bounds, size=1)):
    while len(multiprocessing.active_children()) < 2:  # one may be ready before the other starts
      time.sleep(0.1)
    print("2 processes", flush=True)
    time.sleep(600)

if __name__ == "__main__":
  signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
  try:
    main()
  except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_run(tmp_path, number):
  """Ctrl-C goes to all of them, as a terminal sends it; what kills goes to the first alone."""
  script = tmp_path / "endless.py"
  script.write_text(ENDLESS)
  run = subprocess.Popen(
    [sys.executable, script],
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )
  assert run.stdout.readline() == "2 processes\n"
  (os.killpg if number == signal.SIGINT else os.kill)(run.pid, number)
  try:  # the pipes end when all processes that hold them have ended
    _, errors = run.communicate(timeout=120)
  finally:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(run.pid, signal.SIGKILL)
  assert run.returncode == (130 if number == signal.SIGINT else -number)
  assert "Traceback" not in errors or number != signal.SIGINT
