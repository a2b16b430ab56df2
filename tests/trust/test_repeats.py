"""The same command again gives the same bits, however busy or cold the machine is."""

import json
import os
import subprocess
import sys

import processes
import pytest
import stopping

CIRCUMSTANCES = ("cold cache", "warm cache", "warm again", "one core", "beside another run")


def start(workdir, *before, cache):
  environment = os.environ | {
    "PYTHONPATH": f"{processes.ROOT}:{processes.ROOT / 'tests'}",
    "JAX_COMPILATION_CACHE_DIR": str(cache),
  }
  command = [*before, sys.executable, stopping.__file__, workdir, "{}"]
  return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


@pytest.mark.tier(2)
def test_the_same_run_has_one_result_in_all_circumstances(tmp_path):
  workdirs = {name: tmp_path / name for name in CIRCUMSTANCES}
  for name, workdir in workdirs.items():
    before = ["taskset", "-c", "0"] if name == "one core" else []
    runs = [start(workdir, *before, cache=tmp_path / "cache")]
    if name == "beside another run":
      runs.append(start(tmp_path / "other", cache=tmp_path / "other cache"))
    assert [run.wait() for run in runs] == [0] * len(runs)
  results = [json.loads((workdir / "result.json").read_text()) for workdir in workdirs.values()]
  hashes = {result["params_sha256"] for result in results}
  logs = {(workdir / "metrics.jsonl").read_text() for workdir in workdirs.values()}
  print(f"{len(results)} runs ({', '.join(CIRCUMSTANCES)}): {len(hashes)} distinct hash")
  assert len(hashes) == len(logs) == 1
