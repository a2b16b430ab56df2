"""Program: does the micro runs that its argument lists as JSON, on the devices that there are.

Each goes on in `workdir` with config.mesh.fsdp `fsdp`, and ends after `saves` saves or at its end.
Prints the digests of what it restored, None where it began.
"""

import contextlib
import json
import pathlib
import sys
from unittest import mock

import micro_runs

from fmlora_jax.experiment.run import run
from fmlora_jax.workdir import checkpoint, digest


class Stopped(BaseException):
  """Ends a run where it is."""


def go_on(workdir: str, fsdp: int, saves: int | None) -> dict | None:
  save, latest, seen, left = (
    checkpoint.CheckpointStore.save,
    checkpoint.CheckpointStore.latest,
    [],
    [saves],
  )

  def save_or_stop(*args, **kwargs):
    save(*args, **kwargs)
    left[0] = left[0] and left[0] - 1
    if left[0] == 0:
      raise Stopped

  def noted(store):
    snapshot = latest(store)
    seen.append(snapshot and digest.tree_digests(snapshot.arrays))
    return snapshot

  with (
    mock.patch.object(checkpoint.CheckpointStore, "save", save_or_stop),
    mock.patch.object(checkpoint.CheckpointStore, "latest", noted),
    micro_runs.small_parts(),
    contextlib.suppress(Stopped),
  ):
    run(micro_runs.settings("lora", mesh={"fsdp": fsdp}), pathlib.Path(workdir))
  return seen[0]


if __name__ == "__main__":
  for job in json.loads(sys.argv[1]):
    print("restored", json.dumps(go_on(**job)), flush=True)
