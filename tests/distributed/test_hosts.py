"""Processes that meet, agree, disagree, and end before the others."""

import multiprocessing.connection
import os
import socket
import sys
import threading
import time
from unittest import mock

import jax
import processes
import pytest

from fmlora_jax.config import ConfigError
from fmlora_jax.distributed import hosts

# what a program does with its hosts, and in which way each process ends
PROGRAM = """
import os, signal, sys, time
import jax, jax.numpy as jnp, numpy as np
from fmlora_jax.cli import errors, program
from fmlora_jax.distributed import hosts
from fmlora_jax.config import ConfigError

def refused(do):
  try:
    return do()
  except ConfigError as error:
    return str(error)

def decide():
  raise ConfigError(f"refused by {jax.process_index()}")

def main(argv):
  program.join_hosts()
  index = jax.process_index()
  config = {"seed": 1 + index, "weights": {"path": f"/{index}"}}
  print(hosts.is_first(), hosts.gather("word" * (1 + index)))
  for besides in (("weights.path",), ("weights.path", "seed")):
    print(refused(lambda: hosts.assert_same_on_all({"config": config}, besides=besides)))
  print(hosts.run_on_first(lambda: {"index": index}))
  print(refused(lambda: hosts.run_on_first(decide)))
  sys.stdout.flush()
  if argv[1] == "killed" and index == 1:
    os.kill(os.getpid(), signal.SIGKILL)
  if argv[1] == "killed":
    hosts.gather("")  # for ever
  if argv[1] == "wrong" and index == 1:
    raise ConfigError("config.seed is -1: must be >= 0")
  if argv[1] == "wrong":
    time.sleep(60)  # away from any exchange

with errors.guard():
  main(sys.argv)
"""


def call(how):
  return processes.start([sys.executable, "-c", PROGRAM, how], processes.environment(2))


def test_processes_meet_agree_and_end_together():
  first, second = processes.ended(call("well"))
  assert (first[0], second[0]) == (0, 0), (first[2], second[2])
  difference = "processes differ (config.seed: 1 in process 0, 2 in 1): start all with one command"
  for index, (_, shown, _) in enumerate((first, second)):
    lines = [line for line in shown.splitlines() if "Gloo" not in line]
    assert lines[0] == f"{index == 0} ['word', 'wordword']"
    assert lines[1].startswith(difference) and lines[2] == "None"
    assert lines[3:] == ["{'index': 0}", "refused by 0"]


@pytest.mark.parametrize(("how", "code"), [("killed", -9), ("wrong", 2)])
def test_when_one_ends_so_do_the_others_with_one_line(how, code):
  first, second = processes.ended(call(how))
  assert (first[0], second[0]) == (hosts.PEER_LOST, code)
  assert first[2] == (
    "error: process 1 exited early (see its log). Rerun the same command on all hosts to resume\n"
  )
  if how == "wrong":
    assert second[2] == "error: config.seed is -1: must be >= 0\n"


def test_of_three_that_jax_detects_the_second_ends_and_the_third_hears_which():
  """The variables are those of Slurm, which do not say where the first process is."""
  environments = processes.environment(3)
  port = int(environments[0]["JAX_COORDINATOR_ADDRESS"].rpartition(":")[2])
  step = {"SLURM_JOB_ID": str(port), "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "3"}
  step |= {"SLURM_STEP_NUM_TASKS": "3"}
  for index, environment in enumerate(environments):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
      del environment[name]
    environment |= step | {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)}
  began = time.monotonic()
  command = [sys.executable, "-c", PROGRAM, "killed"]
  first, second, third = processes.ended(processes.start(command, environments))
  assert second[0] == -9
  message = "error: process 1 exited early (see its log). Rerun the same command on all hosts"
  for code, _, errors in (first, third):
    assert code == hosts.PEER_LOST
    assert errors.startswith(message) and errors.count("\n") == 1
  assert time.monotonic() - began < 60


@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_meets_nobody_gives_up_in_one_line(index):
  environment = processes.environment(2, FMLORA_JAX_LAUNCH_TIMEOUT="4")[index]
  program = "from fmlora_jax.distributed import hosts; hosts.join_processes()"
  ((code, shown, errors),) = processes.ended(
    processes.start([sys.executable, "-c", program], [environment])
  )
  assert code == 2 and not shown
  address = environment["JAX_COORDINATOR_ADDRESS"]
  assert errors == (
    f"error: timed out after 4 s waiting for 2 processes at {address}: start each with its own "
    "JAX_PROCESS_ID and check that it can reach process 0 (FMLORA_JAX_LAUNCH_TIMEOUT changes the "
    "limit)\n"
  )


THREE = {
  "JAX_COORDINATOR_ADDRESS": "127.0.0.1:80",
  "JAX_NUM_PROCESSES": "2",
  "JAX_PROCESS_ID": "1",
}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"JAX_PROCESS_ID": None},
      "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES needs JAX_PROCESS_ID: must be set too",
    ),
    ({"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID is 2: must be below JAX_NUM_PROCESSES, 2"),
    ({"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID is '-1': must be a whole number >= 0"),
    ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two': must be a whole number >= 1"),
    ({"JAX_COORDINATOR_ADDRESS": "here"}, "JAX_COORDINATOR_ADDRESS is 'here': must be HOST:PORT"),
    ({"FMLORA_JAX_LAUNCH_TIMEOUT": "0"}, "FMLORA_JAX_LAUNCH_TIMEOUT is '0': must be a whole"),
  ],
)
def test_a_wrong_launch_is_refused_by_the_name_of_the_variable(monkeypatch, changes, message):
  for name, value in (THREE | changes).items():
    if value is None:
      monkeypatch.delenv(name, raising=False)
    else:
      monkeypatch.setenv(name, value)
  with pytest.raises(ConfigError, match=message):
    hosts.join_processes()


@pytest.mark.parametrize(
  ("variables", "several"),
  [
    ({}, False),
    ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, False),  # in the script, before srun
    ({"SLURM_STEP_NUM_TASKS": "1"}, False),
    ({"SLURM_STEP_NUM_TASKS": "4"}, True),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
    ({"TPU_WORKER_HOSTNAMES": "a"}, False),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ({"FMLORA_JAX_CLUSTER": "auto"}, True),
    ({"JAX_COORDINATOR_ADDRESS": "127.0.0.1:80"}, False),  # of a shell that had a job
  ],
)
def test_only_one_of_several_joins(monkeypatch, variables, several):
  joined = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda **given: joined.append(given))
  monkeypatch.setattr(hosts, "is_multi_process", lambda: False)
  for name in list(os.environ):
    if name.startswith(("SLURM_", "OMPI_", "TPU_", "JAX_COORD", "JAX_NUM_P", "JAX_PROCESS")):
      monkeypatch.delenv(name)
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  hosts.join_processes()
  assert bool(joined) == several
  assert not joined or set(joined[0]) == {"initialization_timeout", "heartbeat_timeout_seconds"}


@pytest.mark.parametrize(
  ("address", "own"),
  [("127.0.0.1:80", True), ("localhost:80", True), ("[::1]:80", True), ("10.0.0.1:80", False)],
)
def test_processes_of_one_machine_listen_to_it_alone(monkeypatch, address, own):
  joined = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda **given: joined.append(given))
  monkeypatch.setattr(hosts, "is_multi_process", lambda: False)
  for name, value in (THREE | {"JAX_COORDINATOR_ADDRESS": address}).items():
    monkeypatch.setenv(name, value)
  hosts.join_processes()
  assert joined[0].get("coordinator_bind_address") == (address if own else None)


def test_a_port_of_processes_of_one_machine_is_closed_to_others():
  """127.0.0.2 reaches what listens on all interfaces, as another machine does."""
  environment, _ = processes.environment(2, FMLORA_JAX_LAUNCH_TIMEOUT="8")
  port = int(environment["JAX_COORDINATOR_ADDRESS"].rpartition(":")[2])
  program = "from fmlora_jax.distributed import hosts; hosts.join_processes()"
  (first,) = processes.start([sys.executable, "-c", program], [environment])

  def is_open(host):
    with socket.socket() as client:
      return client.connect_ex((host, port)) == 0

  while first.poll() is None and not is_open("127.0.0.1"):
    time.sleep(0.1)
  assert first.poll() is None and not is_open("127.0.0.2")
  first.kill()
  first.communicate()


def test_strangers_do_not_keep_processes_from_meeting():
  key = b"secret"
  with socket.create_server(("127.0.0.1", 0)) as server:
    address, met = server.getsockname(), {}
    waiting = threading.Thread(target=lambda: met.update(hosts._accept(server, key, 1)))
    waiting.start()
    silent, rude = socket.create_connection(address), socket.create_connection(address)
    rude.sendall(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(multiprocessing.AuthenticationError):
      multiprocessing.connection.Client(address, authkey=b"wrong")
    with multiprocessing.connection.Client(address, authkey=key) as known, silent, rude:
      known.send_bytes(b"1")
      waiting.join(timeout=20)
      assert list(met) == [1]
      met[1].close()


def test_a_program_of_one_process_asks_nobody():
  hosts.assert_same_on_all({"config": {"seed": 1}})
  assert hosts.is_first() and hosts.gather("x") == ["x"]
  assert hosts.run_on_first(lambda: 3) == 3
  hosts.barrier()


def test_a_signal_from_before_the_watch_was_there_is_told_later(monkeypatch):
  watched = mock.Mock(**{"stops.return_value": 0})
  monkeypatch.setattr(hosts, "_watch", watched)
  assert hosts.requested_stop(0) == 0 and not watched.ask.called
  hosts.requested_stop(15)
  watched.ask.assert_called_once_with(15)


def test_of_several_addresses_the_first_that_answers_is_taken():
  key = b"secret"
  with multiprocessing.connection.Listener(("127.0.0.1", 0), authkey=key) as listener:
    port = listener.address[1]
    reached = []
    addresses = ["no-such-host.invalid", "127.0.0.1"]
    thread = threading.Thread(target=lambda: reached.append(hosts._reach(addresses, port, key)))
    thread.start()
    with listener.accept() as accepted:
      thread.join()
      accepted.send_bytes(b"hello")
      assert reached[0].recv_bytes() == b"hello"
      reached[0].close()
  with pytest.raises(OSError):
    hosts._reach(addresses, port, key)
