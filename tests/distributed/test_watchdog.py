"""What processes tell each other, over pipes between threads of one process."""

import multiprocessing
import threading
import time

import pytest

from fmlora_jax.distributed import watchdog

COUNT = 3


class Group:
  """Watches of so many processes, connected as hosts.py does it; `ended` are their last lines."""

  def __init__(self, count=COUNT):
    pipes = {index: multiprocessing.Pipe() for index in range(1, count)}
    ends = [{index: pipe[0] for index, pipe in pipes.items()}]
    ends += [{0: pipe[1]} for pipe in pipes.values()]
    self.ended: dict[int, str] = {}
    self.connections = ends
    self.watches = [watchdog.Watchdog(end, self._ends(index)) for index, end in enumerate(ends)]
    for one in self.watches:
      one.start()

  def _ends(self, index):
    return lambda message: self.ended.setdefault(index, message)

  def wait(self, count, seconds=10):
    until = time.monotonic() + seconds
    while len(self.ended) < count and time.monotonic() < until:
      time.sleep(0.01)
    return self.ended

  def finish(self):
    """Has all say that they may end, and waits until all have heard it."""
    for one in self.watches:
      one.finish()
    until = time.monotonic() + 1  # some test's process has ended
    while time.monotonic() < until:
      if all(one._finished == set(one._connections) for one in self.watches):
        return
      time.sleep(0.01)

  def close(self):
    for end in self.connections:
      for connection in end.values():
        connection.close()


@pytest.fixture
def group():
  made = Group()
  yield made
  made.finish()
  made.close()


@pytest.mark.parametrize("asked", [(0,), (1,), (2,), (0, 1, 2)])
def test_all_stop_at_the_same_call_whoever_is_asked_and_however_far_each_is(group, asked):
  stopped, barrier = {}, threading.Barrier(COUNT)

  def work(index):
    for call in range(400):
      if call % 40 == 0:
        barrier.wait()  # an exchange: nobody is 40 calls ahead
      time.sleep(0.0002 * (1 + index))
      if signum := group.watches[index].stops():
        stopped[index] = call, signum
        return

  threads = [threading.Thread(target=work, args=(index,)) for index in range(COUNT)]
  for thread in threads:
    thread.start()
  time.sleep(0.02)
  for index in asked:
    group.watches[index].ask(15)
  for thread in threads:
    thread.join()
  assert len(set(stopped.values())) == 1 and len(stopped) == COUNT
  (call, signum), *_ = stopped.values()
  assert signum == 15 and call < 399


def test_nobody_stops_who_is_not_asked(group):
  assert [one.stops() for one in group.watches for _ in range(100)] == [0] * 100 * COUNT


def test_one_that_ends_ends_all_and_is_named(group):
  group.connections[2][0].close()
  ended = group.wait(2)
  message = f"process 2 exited early (see its log). {watchdog.FIX}"
  assert ended[0] == ended[1] == message


def test_one_whose_work_is_done_may_end(group):
  group.finish()
  group.close()
  time.sleep(0.2)
  assert not group.ended


def test_one_whose_work_is_done_hears_of_one_that_ends_before_its_own_is(group):
  group.watches[1].finish()
  group.connections[2][0].close()
  assert set(group.wait(3)) == {0, 1, 2}


def test_one_that_is_silent_ends_all(monkeypatch):
  monkeypatch.setattr(watchdog, "HEARTBEAT_S", 2)
  monkeypatch.setattr(watchdog, "BEAT_S", 0.5)
  monkeypatch.setattr(watchdog.Watchdog, "_beat", lambda self: None)  # a process that was suspended
  group = Group(count=2)
  ended = group.wait(2)
  group.close()
  assert f"process 1 was silent for 2 s: suspended or unreachable. {watchdog.FIX}" == ended[0]


def test_beats_keep_a_quiet_group_alive(monkeypatch):
  monkeypatch.setattr(watchdog, "HEARTBEAT_S", 1)
  monkeypatch.setattr(watchdog, "BEAT_S", 0.2)
  group = Group()
  time.sleep(2.5)
  assert not group.ended
  group.finish()
  group.close()
