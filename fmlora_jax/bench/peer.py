"""The peer of the benchmark: Hugging Face's ViT with PEFT's LoRA, trained step by step in PyTorch.

It runs in a process of its own, which `Peer` starts with this file and one JSON argument; PyTorch's
threads and memory stay apart from JAX's, and any Python with torch, transformers and peft will do.
The process says on its standard output what it is, then answers each [variant, steps] that it reads
with {"seconds": s}.

The frozen ViT, LoRA on query and value (r = alpha, no dropout), a trained head, AdamW on the
trained parameters; scaled_dot_product_attention; in bfloat16 everything is bfloat16, which is
faster than autocast. In float32 on CUDA TF32 is allowed, as JAX does.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from typing import Any


class Peer:
  """The process, to be used in a `with` block.

  Args:
    request: architecture and sizes of the ViT, batch, dtype, rank, num_classes.
    python: the interpreter.

  Attributes:
    facts: device, versions, notes, and the variants that work ("eager", "compile").

  Raises:
    ValueError: if the process ends before it answers.
  """

  def __init__(self, request: dict[str, Any], python: str):
    # -P: the script's folder has a types.py, which is not Python's
    command = [python, "-P", __file__, json.dumps(request)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    self._process = subprocess.Popen(command, **pipes)
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


def make_step(request: dict, compile_it: bool):
  """Returns the function that does one training step on a fixed random batch."""
  import peft
  import torch
  import transformers

  device = "cuda" if torch.cuda.is_available() else "cpu"
  dtype = getattr(torch, request["dtype"])
  torch.manual_seed(0)
  model = transformers.ViTForImageClassification(
    transformers.ViTConfig(
      image_size=request["image_size"],
      patch_size=request["patch_size"],
      hidden_size=request["width"],
      num_hidden_layers=request["depth"],
      num_attention_heads=request["num_heads"],
      intermediate_size=request["width"] * request["mlp_ratio"],
      num_labels=request["num_classes"],
      attn_implementation="sdpa",
    )
  )
  names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
  targets = ["q_proj", "v_proj"] if "q_proj" in names else ["query", "value"]
  lora = peft.LoraConfig(
    r=request["rank"],
    lora_alpha=request["rank"],
    target_modules=targets,
    modules_to_save=["classifier"],
  )
  model = peft.get_peft_model(model.to(device, dtype), lora, autocast_adapter_dtype=False)
  model.train()
  trained = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=1e-2, fused=True)
  forward = torch.compile(model) if compile_it else model
  shape = (request["batch"], 3, request["image_size"], request["image_size"])
  images = torch.randn(shape, device=device, dtype=dtype)
  labels = torch.arange(request["batch"], device=device) % request["num_classes"]

  def step():
    optimizer.zero_grad(set_to_none=True)
    logits = forward(pixel_values=images).logits
    torch.nn.functional.cross_entropy(logits.float(), labels).backward()
    optimizer.step()

  return step


def seconds(step, steps: int) -> float:
  """Returns the seconds that `steps` steps take, with what the device still has to do."""
  import torch

  wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
  wait()
  began = time.monotonic()
  for _ in range(steps):
    step()
  wait()
  return time.monotonic() - began


def prepare(request: dict) -> tuple[dict, dict]:
  """Returns the variants as step functions, and what the peer is."""
  import peft
  import torch
  import transformers

  torch.set_float32_matmul_precision("high")  # TF32 on CUDA; a CPU has none
  variants, notes = {"eager": make_step(request, compile_it=False)}, []
  try:
    compiled = make_step(request, compile_it=True)
    began = time.monotonic()
    compiled()
    notes.append(f"torch.compile took {time.monotonic() - began:.1f} s")
    variants["compile"] = compiled
  except Exception as error:  # no compiler, or a model that it cannot take
    notes.append(f"torch.compile does not work here: {str(error).strip().splitlines()[0][:120]}")
  device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
  return variants, {
    "variants": list(variants),
    "device": f"{device}, {torch.get_num_threads()} threads",
    "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft)},
    "notes": notes,
  }


def main() -> None:
  answers = os.fdopen(os.dup(1), "w")  # libraries that print shall not mix with the answers
  os.dup2(2, 1)

  def answer(record):
    answers.write(json.dumps(record) + "\n")
    answers.flush()

  variants, facts = prepare(json.loads(sys.argv[1]))
  answer(facts)
  with contextlib.suppress(KeyboardInterrupt):
    for line in sys.stdin:
      variant, steps = json.loads(line)
      answer({"seconds": seconds(variants[variant], steps)})


if __name__ == "__main__":
  main()
