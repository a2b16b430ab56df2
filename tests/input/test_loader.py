import concurrent.futures
import threading

import pytest

from fmlora_jax.input.loader import Prefetcher


def test_work_is_done_in_order_beside_the_caller():
  begun, go_on = threading.Event(), threading.Event()

  def first(value, stop):
    begun.set()
    assert go_on.wait(30)
    return value, stop.is_set()

  with Prefetcher() as ahead:
    one, two = ahead.submit(first, 1), ahead.submit(lambda stop: one.done())
    assert begun.wait(30) and not one.done()
    go_on.set()
    assert one.result(30) == (1, False)
    assert two.result(30)


def test_an_early_end_stops_what_is_under_way_and_drops_the_rest():
  begun = threading.Event()

  def until_stopped(stop):
    begun.set()
    return stop.wait(30)

  with pytest.raises(KeyboardInterrupt), Prefetcher() as ahead:
    running, waiting = ahead.submit(until_stopped), ahead.submit(until_stopped)
    assert begun.wait(30)
    raise KeyboardInterrupt
  assert running.result(0)
  with pytest.raises(concurrent.futures.CancelledError):
    waiting.result(0)
