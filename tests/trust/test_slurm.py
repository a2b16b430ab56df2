"""launch/slurm.sh on a Slurm cluster that the test starts: two nodes on one machine.

It needs root and what Debian's slurm-wlm and munge install, and is skipped without.
"""

import contextlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import processes
import pytest

from fmlora_jax.distributed import stop

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
SETTINGS = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={place}/munge.socket
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd-%n.pid
SlurmdSpoolDir={place}/spool-%n
StateSaveLocation={place}/state
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=2
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=2
PartitionName=all Nodes=ALL Default=YES OverSubscribe=FORCE:4
"""
ARGUMENTS = (
  "--config=configs/digits.py",
  "--config.epochs=4",
  "--config.drs.strategy=fixed",
  "--config.input.steps_per_dispatch=2",
)
ONE_NODE = ("--nodes=1", "--ntasks-per-node=2")
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")


def free_ports(count: int) -> list[int]:
  with contextlib.ExitStack() as stack:
    servers = [stack.enter_context(socket.create_server(("", 0))) for _ in range(count)]
    return [server.getsockname()[1] for server in servers]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
  """Starts the daemons; Slurm's programs find them by SLURM_CONF."""
  if os.geteuid() or not all(map(shutil.which, PROGRAMS)):
    pytest.skip(f"starts {', '.join(PROGRAMS)} as root: apt-get install slurm-wlm munge")
  place, host = tmp_path_factory.mktemp("slurm"), socket.gethostname().partition(".")[0]
  port, first, second = free_ports(3)
  conf, key = place / "slurm.conf", place / "munge.key"
  conf.write_text(SETTINGS.format(place=place, host=host, port=port, first=first, second=second))
  key.write_bytes(os.urandom(1024))
  key.chmod(0o400)
  names = {"pid": "pid", "log": "log", "seed": "seed"}
  files = [f"--{name}-file={place}/munge.{name}" for name in names]
  socket_and_key = [f"--socket={place}/munge.socket", f"--key-file={key}"]
  commands = [
    ["munged", "--foreground", "--force", *socket_and_key, *files],
    ["slurmctld", "-D", "-c", "-f", conf],
    ["slurmd", "-D", "-f", conf, "-N", host],
    ["slurmd", "-D", "-f", conf, "-N", "localhost"],
  ]
  for name in ("state", f"spool-{host}", "spool-localhost"):
    (place / name).mkdir()
  with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
    patch.setenv("SLURM_CONF", str(conf))
    for command in commands:
      output = stack.enter_context(open(place / f"{command[0]}.out", "a"))
      daemon = subprocess.Popen(command, stdout=output, stderr=output)
      stack.callback(daemon.wait)
      stack.callback(daemon.terminate)
      time.sleep(1)
    yield
    subprocess.run(["scancel", "--user=root"], check=True)
    time.sleep(2)


def submitted(workdir, nodes) -> str:
  """Submits a job; returns its number."""
  output = workdir.with_name(f"{workdir.name}.out")
  command = ["sbatch", "--parsable", "--cpus-per-task=1", *nodes, f"--output={output}"]
  command += ["launch/slurm.sh", *ARGUMENTS, f"--workdir={workdir}"]
  done = subprocess.run(command, cwd=processes.ROOT, capture_output=True, text=True, check=True)
  return done.stdout.strip()


def state(job) -> dict[str, str]:
  shown = subprocess.run(
    ["scontrol", "show", "job", "--oneliner", job], capture_output=True, text=True, check=True
  )
  return dict(field.split("=", 1) for field in shown.stdout.split() if "=" in field)


def ended(job) -> str:
  """Returns the exit code of a job as Slurm has it, such as "143:0"."""
  return until(lambda: state(job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED"), job)[
    "ExitCode"
  ]


def until(condition, job) -> dict[str, str]:
  """Waits; returns the state of the job."""
  began = time.monotonic()
  while not condition():
    assert time.monotonic() - began < 600, state(job)
    time.sleep(0.1)
  return state(job)


def in_training(workdir) -> bool:
  metrics = workdir / "metrics.jsonl"
  return metrics.exists() and metrics.read_text().count("train/loss") >= 10


def result(workdir: pathlib.Path) -> list:
  found = json.loads((workdir / "result.json").read_text())
  return [found[name] for name in ("params_sha256", "accuracy", "ranks")]


@pytest.mark.tier(3)
def test_jobs_of_slurm_end_as_two_processes_do(slurm, tmp_path):
  command = [sys.executable, "-m", "fmlora_jax.main", *ARGUMENTS]
  plain = processes.start([*command, f"--workdir={tmp_path / 'plain'}"], processes.environment(2))
  ends = processes.ended(plain)
  assert [code for code, *_ in ends] == [0, 0], ends
  expected, equal = result(tmp_path / "plain"), []

  def compare(name, job):
    assert ended(job) == "0:0", (tmp_path / f"{name}.out").read_text()
    equal.append(result(tmp_path / name) == expected)

  compare("node", submitted(tmp_path / "node", ONE_NODE))
  compare("nodes", submitted(tmp_path / "nodes", TWO_NODES))

  job = submitted(tmp_path / "stopped", TWO_NODES)
  until(lambda: in_training(tmp_path / "stopped"), job)
  subprocess.run(["scancel", "--signal=TERM", job], check=True)
  assert ended(job) == f"{stop.Stopped(15).code}:0"
  compare("stopped", submitted(tmp_path / "stopped", TWO_NODES))

  job = submitted(tmp_path / "requeued", TWO_NODES)
  until(lambda: in_training(tmp_path / "requeued"), job)
  subprocess.run(["scontrol", "requeue", job], check=True)
  until(lambda: state(job)["Restarts"] == "1", job)
  compare("requeued", job)
  print(f"{sum(equal)}/{len(equal)} jobs end with the hash of two plain processes")
  assert equal == [True] * 4
