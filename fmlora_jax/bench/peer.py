"""The process that runs PyTorch's side of a benchmark.

Its threads and memory are separate from JAX's; any Python with torch, transformers and
peft will do.
"""

import contextlib
import json
import pathlib
import subprocess
from typing import Any

from fmlora_jax.config import ConfigError

VARIANTS = {  # name -> label in the table
  "peft": "HF + PEFT",
  "peft_compiled": "HF + PEFT, torch.compile",
  "timm": "timm + PEFT",
  "timm_compiled": "timm + PEFT, torch.compile",
  "sd_lora": "HF + SD-LoRA's stack",  # at task 20
  "sd_lora_compiled": "the same, torch.compile",
}
# the compiled stack takes minutes before its first step
DEFAULT = tuple(name for name in VARIANTS if name != "sd_lora_compiled")
MODULES = ("torch", "transformers", "peft")


def check_python(python: str) -> None:
  """Refuses an interpreter that does not start or lacks a module of the peers.

  Raises:
    ConfigError: with what is missing.
  """
  program = (
    "import importlib.util as u, sys; print(*(m for m in sys.argv[1:] if not u.find_spec(m)))"
  )
  said = f"--peers_python is {python!r}: must be a Python with {', '.join(MODULES)}"
  try:
    command = [python, "-P", "-c", program, *MODULES]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
  except (OSError, subprocess.SubprocessError, ValueError) as error:
    raise ConfigError(f"{said}; it can't be started ({error})") from None
  if missing := done.stdout.split():
    raise ConfigError(f"{said}; run {python} -m pip install {' '.join(missing)}")


class Peer:
  """A process that times PyTorch's training steps; to be used in a `with` block.

  Args:
    request: sizes of the ViT, batch, dtype, rank, num_classes and variants.
    python: path of the interpreter.

  Attributes:
    facts: device, versions, notes, and the variants that work.

  Raises:
    ValueError: if the process ends before it answers.
  """

  def __init__(self, request: dict[str, Any], python: str):
    script = pathlib.Path(__file__).with_name("torch_peers.py")
    # -P: modules beside the script must not hide Python's
    command = [python, "-P", str(script), json.dumps(request)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    self._process: Any = subprocess.Popen(command, **pipes)
    self.facts = self._answer()

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self._close()

  def run(self, variant: str, steps: int) -> float:
    """Returns the seconds that `steps` training steps take."""
    self._process.stdin.write(json.dumps([variant, steps]) + "\n")
    self._process.stdin.flush()
    return self._answer()["seconds"]

  def _answer(self) -> dict[str, Any]:
    line = self._process.stdout.readline()
    if not line:
      code = self._close()
      raise ValueError(
        f"the peer ended with code {code}; --peers needs torch, transformers and peft in the "
        "Python that --peers_python names"
      )
    return json.loads(line)

  def _close(self) -> int:
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.close()
    self._process.stdout.close()
    return self._process.wait()
