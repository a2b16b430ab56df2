"""Makes the golden checkpoint of today's format, which later versions must go on from.

JAX_PLATFORMS=cpu python tests/trust/golden_checkpoint.py tests/golden/checkpoint_1.zip

It is the workdir of a micro run that was stopped within its second task, and golden.json: the
digests of what it holds, the losses of five further steps, and the versions that made them.
"""

import json
import pathlib
import shutil
import sys
import tempfile

if __name__ == "__main__":
  sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import on_devices

from fmlora_jax.experiment import provenance

EXPECTED = "golden.json"
STEPS = 5
FOLDERS = ("events", "plots")  # which no run reads


def losses(workdir: pathlib.Path, first: int) -> list[float]:
  """Returns the losses of `STEPS` steps from `first` on."""
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  by_step = {line["step"]: line["value"] for line in lines if line["name"] == "train/loss"}
  return [by_step[step] for step in range(first, first + STEPS)]


def make(archive: pathlib.Path) -> None:
  with tempfile.TemporaryDirectory() as folder:
    stopped, whole = pathlib.Path(folder, "stopped"), pathlib.Path(folder, "whole")
    on_devices.go_on(str(stopped), fsdp=1, saves=3)
    shutil.copytree(stopped, whole)
    digests = on_devices.go_on(str(whole), fsdp=1, saves=None)
    step = max(int(path.name) for path in (stopped / "checkpoints").iterdir())
    expected = {
      "step": step,
      "digests": digests,
      "losses": losses(whole, step),
      "versions": provenance.versions(),
    }
    (stopped / EXPECTED).write_text(json.dumps(expected, indent=1) + "\n")
    for name in FOLDERS:
      shutil.rmtree(stopped / name, ignore_errors=True)
    shutil.make_archive(str(archive.with_suffix("")), "zip", stopped)


if __name__ == "__main__":
  make(pathlib.Path(sys.argv[1]))
  print(sys.argv[1], pathlib.Path(sys.argv[1]).stat().st_size, "bytes")
