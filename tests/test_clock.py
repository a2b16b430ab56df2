"""Kinds of wall time exclude each other, sum up to the whole, and hold compilation apart."""

import threading
import time

import jax
import pytest

from fmlora_jax.clock import KINDS, Clock


@pytest.fixture
def passing(monkeypatch):
  """Returns the function seconds -> None that lets time pass on a clock that else stands still."""
  now = [1000.0]
  monkeypatch.setattr(time, "monotonic", lambda: now[0])

  def pass_seconds(seconds):
    now[0] += seconds

  return pass_seconds


def test_a_block_within_a_block_counts_as_its_own_kind(passing):
  clock = Clock(began=990.0)
  passing(1)
  with clock.kind("train"):
    passing(2)
    with clock.kind("checkpoint"):
      passing(4)
    with pytest.raises(ValueError), clock.kind("data"):
      passing(8)
      raise ValueError
    passing(16)
  passing(32)
  seconds = clock.seconds()
  expected = {"import": 10, "train": 18, "checkpoint": 4, "data": 8, "other": 33, "total": 73}
  assert seconds == dict.fromkeys(KINDS, 0.0) | expected
  passing(1)
  assert clock.seconds() == seconds | {"other": 34, "total": 74}


def test_earlier_sessions_are_added(passing):
  clock = Clock(began=1000.0)
  clock.add({"train": 5.0, "compile": 3.0, "total": 8.0})
  passing(2)
  assert clock.seconds() == dict.fromkeys(KINDS, 0.0) | {
    "train": 5,
    "compile": 3,
    "other": 2,
    "total": 10,
  }


def test_tracing_that_nests_is_counted_once_and_taken_from_the_kind_it_was_in():
  @jax.jit
  def inner(x):
    time.sleep(0.2)
    return x + 1

  @jax.jit
  def outer(x):
    time.sleep(0.1)
    return inner(x) * 2

  clock = Clock(began=time.monotonic())
  with clock, clock.kind("eval"):
    outer(jax.numpy.float32(1))
    time.sleep(0.15)
  before = clock.seconds()
  jax.jit(lambda x: x + 3)(1.0)  # the clock is left
  seconds = clock.seconds()
  assert 0.3 <= seconds["compile"] == before["compile"]
  assert seconds["eval"] >= 0.15
  assert sum(seconds[kind] for kind in KINDS) == pytest.approx(seconds["total"])
  # had the inner tracing counted twice, it would be missing in eval
  assert seconds["total"] - seconds["compile"] - seconds["other"] - seconds["eval"] < 0.01


def test_what_another_thread_compiles_takes_no_time_of_the_run():
  clock = Clock(began=time.monotonic())
  with clock:
    thread = threading.Thread(target=lambda: jax.jit(lambda x: x * 5 + 1)(2.0))
    thread.start()
    thread.join()
  assert clock.seconds()["compile"] == 0
