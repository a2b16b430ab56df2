import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmlora_jax import tasks
from fmlora_jax.config import ConfigError, TasksConfig
from fmlora_jax.tasks import resident


@pytest.fixture(scope="module")
def made():
  return tasks.make(TasksConfig(), seed=0, source_size=8)


def test_tasks_have_arrays_of_one_shape(made):
  capacity = resident.capacity(made, "train")
  assert capacity == max(len(task.train) for task in made.tasks)
  for task in made.tasks:
    loaded = resident.load(made, task.train, capacity)
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


def test_memory_is_stated_and_a_budget_kept(made):
  rows = made.tasks[0].val
  loaded = resident.load(made, rows, len(rows))
  parts = (loaded.images, loaded.sizes, loaded.labels, loaded.valid)
  assert sum(part.nbytes for part in parts) == resident.num_bytes(made, len(rows))
  largest = resident.capacity(made, "train") + resident.capacity(made, "val")
  device = resident.num_bytes(made, largest)
  host = resident.num_bytes(made, largest + sum(len(task.test) for task in made.tasks))
  resident.check_memory(made, "test", device=device, host=host)
  for place, budget in (
    ("device", {"device": device - 1, "host": host}),
    ("host", {"device": device, "host": host - 1}),
  ):
    message = rf"digits: \d+ images of 8 x 8 .*, the {place} has .* lower config.input.source_size"
    with pytest.raises(ConfigError, match=message):
      resident.check_memory(made, "test", **budget)


def test_more_images_than_capacity_are_refused(made):
  with pytest.raises(ValueError, match="capacity is 1: must be at least"):
    resident.load(made, made.tasks[0].val, 1)


def test_no_images_are_loaded_as_padding(made):
  loaded = resident.load(made, np.array([], np.int64), 2)
  assert not loaded.valid.any()


@given(num=st.integers(0, 50), batch_size=st.integers(1, 20), epoch=st.integers(0, 3))
def test_an_epoch_visits_each_row_once(num, batch_size, epoch):
  rows = resident.epoch_indices(num, batch_size, seed=1, task=2, epoch=epoch)
  assert rows.dtype == np.int32
  assert rows.shape == (-(-num // batch_size), batch_size)
  flat = rows.reshape(-1)
  assert sorted(flat[:num]) == list(range(num))
  assert (flat[num:] == -1).all()


def test_order_depends_on_seed_task_and_epoch_alone():
  orders = {
    (seed, task, epoch): resident.epoch_indices(100, 10, seed, task, epoch).tobytes()
    for seed in (0, 1) for task in (0, 1) for epoch in (0, 1)
  }  # fmt: skip
  assert len(set(orders.values())) == 8
  again = resident.epoch_indices(100, 10, 1, 0, 1)
  assert again.tobytes() == orders[1, 0, 1]
