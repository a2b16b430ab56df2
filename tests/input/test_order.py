import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmlora_jax.input import order


@given(num=st.integers(0, 50), batch_size=st.integers(1, 20), epoch=st.integers(0, 3))
def test_an_epoch_visits_each_row_once(num, batch_size, epoch):
  rows = order.epoch_indices(num, batch_size, seed=1, task=2, epoch=epoch)
  assert rows.dtype == np.int32
  assert rows.shape == (-(-num // batch_size), batch_size)
  flat = rows.reshape(-1)
  assert sorted(flat[:num]) == list(range(num))
  assert (flat[num:] == -1).all()


def test_order_depends_on_seed_task_and_epoch_alone():
  orders = {
    (seed, task, epoch): order.epoch_indices(100, 10, seed, task, epoch).tobytes()
    for seed in (0, 1) for task in (0, 1) for epoch in (0, 1)
  }  # fmt: skip
  assert len(set(orders.values())) == 8
  again = order.epoch_indices(100, 10, 1, 0, 1)
  assert again.tobytes() == orders[1, 0, 1]


def test_the_natural_order_is_padded_too():
  np.testing.assert_array_equal(order.natural(5, 2), [[0, 1], [2, 3], [4, -1]])
  assert order.natural(0, 2).shape == (0, 2)


@pytest.mark.parametrize(
  ("start", "every", "expected"),
  [(0, 0, (0, 4, 8, 10)), (3, 0, (3, 7, 10)), (0, 3, (0, 3, 6, 9, 10)), (4, 6, (4, 6, 10))],
)
def test_steps_are_cut_at_checkpoints(start, every, expected):
  assert order.bounds(start, 10, 4, every) == expected


def test_no_steps_are_no_chunks():
  assert order.bounds(10, 10, 4, 0) == (10,)


@given(num=st.integers(1, 20), start=st.integers(0, 6), every=st.integers(0, 4))
def test_chunks_are_the_steps_of_the_epochs_from_any_start_on(num, start, every):
  epochs = [order.epoch_indices(num, 4, 1, 2, epoch) for epoch in range(12)]
  steps = np.concatenate(epochs)[start:12]
  chunks = order.Chunks(
    num=num, batch_size=4, width=4, seed=1, task=2, size=3, bounds=order.bounds(start, 12, 3, every)
  )
  got = list(pickle.loads(pickle.dumps(chunks)))
  assert len(got) == len(chunks)
  assert {rows.shape for rows in got} == {(3, 4)}
  filled = [rows[rows[:, 0] >= 0] for rows in got]
  assert all((rows[len(some) :] == -1).all() for rows, some in zip(got, filled, strict=True))
  np.testing.assert_array_equal(np.concatenate(filled), steps)
