"""A checkpoint of some devices is restored on others, bit for bit."""

import json
import pathlib
import shutil
import subprocess
import sys

import processes
import pytest

SAVED_BY = ((8, 1), (8, 2), (8, 4))  # devices, of which so many share a backbone


def on(devices, jobs):
  """Does the jobs of on_devices.py on so many devices; returns what each restored."""
  (env,) = processes.environment(
    1, XLA_FLAGS=processes.with_devices(devices), NPROC=str(32 * devices)
  )
  for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
    del env[name]
  program = pathlib.Path(__file__).with_name("on_devices.py")
  command = [sys.executable, str(program), json.dumps(jobs)]
  done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  lines = [line for line in done.stdout.splitlines() if line.startswith("restored ")]
  return [json.loads(line.removeprefix("restored ")) for line in lines]


def saved(workdir):
  """Returns the digests in the newest step of a workdir."""
  newest = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
  record = json.loads((newest / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
  return record["digests"]


def final_loss(workdir):
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return [line["value"] for line in lines if line["name"] == "train/loss"][-1]


@pytest.mark.tier(2)
def test_devices_that_do_not_divide_a_batch_train_the_same(tmp_path):
  counts = (1, 3, 6)  # batches of 16 and 8
  for devices in counts:
    on(devices, [{"workdir": str(tmp_path / str(devices)), "fsdp": 1, "saves": None}])
  losses = [final_loss(tmp_path / str(devices)) for devices in counts]
  assert max(abs(loss / losses[0] - 1) for loss in losses) <= 1e-5
  results = [json.loads((tmp_path / str(n) / "result.json").read_text()) for n in counts]
  assert results[0]["accuracy"] == results[1]["accuracy"] == results[2]["accuracy"]


@pytest.mark.tier(2)
def test_a_checkpoint_of_eight_devices_is_the_same_on_others_and_back(tmp_path):
  equal = total = 0
  starts = [tmp_path / f"saved by {devices}, {fsdp}" for devices, fsdp in SAVED_BY]
  jobs = [
    {"workdir": str(workdir), "fsdp": fsdp, "saves": 1}
    for workdir, (_, fsdp) in zip(starts, SAVED_BY, strict=True)
  ]
  whole = tmp_path / "whole"
  on(8, [*jobs, {"workdir": str(whole), "fsdp": 1, "saves": None}])
  losses, back = [], []
  for devices in (1, 2, 4, 8):
    copies = [shutil.copytree(start, tmp_path / f"{start.name} on {devices}") for start in starts]
    saves = [2, None, None]  # the first is handed back
    jobs = [
      {"workdir": str(copy), "fsdp": 1, "saves": number}
      for copy, number in zip(copies, saves, strict=True)
    ]
    for start, restored in zip(starts, on(devices, jobs), strict=True):
      equal, total = equal + (restored == saved(start)), total + 1
    back.append(copies[0])
    losses += [final_loss(copy) for copy in copies[1:]]
  expected = [saved(workdir) for workdir in back]
  jobs = [{"workdir": str(workdir), "fsdp": 1, "saves": None} for workdir in back]
  for digests, restored in zip(expected, on(8, jobs), strict=True):
    equal, total = equal + (restored == digests), total + 1
  losses += [final_loss(workdir) for workdir in back]
  apart = max(abs(loss / final_loss(whole) - 1) for loss in losses)
  print(f"{equal}/{total} restored with equal digests, final losses of {len(losses)} runs "
        f"within {apart:.1e}")  # fmt: skip
  assert equal == total == 16 and apart <= 1e-5
