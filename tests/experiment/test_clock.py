"""Kinds of wall time exclude each other, sum up to the whole, and hold compilation apart."""

import threading
import time

import jax
import pytest

from fmlora_jax.experiment.clock import COMPILE_EVENTS, KINDS, Clock


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


def test_compilation_is_taken_from_the_kind_it_was_in():
  @jax.jit
  def slow_to_trace(x):
    time.sleep(0.3)
    return x + 1

  clock = Clock(began=time.monotonic())
  with clock, clock.kind("eval"):
    slow_to_trace(1.0)
    time.sleep(0.1)
  before = clock.seconds()
  jax.jit(lambda x: x + 3)(1.0)  # the clock is left
  seconds = clock.seconds()
  assert 0.3 <= seconds["compile"] == before["compile"]
  assert 0.1 <= seconds["eval"] <= seconds["total"] - seconds["compile"] - seconds["other"]
  assert sum(seconds[kind] for kind in KINDS) == pytest.approx(seconds["total"])


def test_compilations_within_compilations_are_counted_once():
  clock = Clock(began=time.monotonic())
  with clock:
    for start, end in ((0, 1), (3, 4), (5, 6), (2, 9), (10, 11)):  # seconds, as each one ends
      jax.monitoring.record_event_time_span(COMPILE_EVENTS[0], start, end)
    jax.monitoring.record_event_time_span("/another/event", 20, 30)
  assert clock.seconds()["compile"] == 1 + 7 + 1


def test_what_another_thread_compiles_takes_no_time_of_the_run():
  clock = Clock(began=time.monotonic())
  with clock:
    thread = threading.Thread(target=lambda: jax.jit(lambda x: x * 5 + 1)(2.0))
    thread.start()
    thread.join()
  assert clock.seconds()["compile"] == 0
