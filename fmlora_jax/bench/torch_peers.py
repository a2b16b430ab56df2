"""Training steps in PyTorch: a script that `peer.Peer` starts.

Its one argument is a JSON request. It writes the facts of `prepare` to its standard output, then
{"seconds": s} for each [variant, steps] that it reads. All variants train a head and low-rank
factors on query and value of a frozen ViT, with AdamW and scaled_dot_product_attention. In bfloat16
everything is bfloat16, which is faster than autocast. In float32 on CUDA TF32 is allowed, as in
JAX.
"""

# the peers are in an environment of their own
# pyright: reportMissingImports=false

import contextlib
import importlib
import json
import os
import sys
import time

SD_LORA_RANK, SD_LORA_TASK, SD_LORA_START = 10, 20, 0.8  # as SD-LoRA's code


def hugging_face(request: dict):
  """Returns Hugging Face's ViT, random, with a fresh head."""
  import transformers

  return transformers.ViTForImageClassification(
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


def query_and_value(model) -> list[str]:
  """Returns the names of the two projections in this version of transformers."""
  names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
  return ["q_proj", "v_proj"] if "q_proj" in names else ["query", "value"]


def with_peft(model, request: dict, targets: list[str], head: str):
  """Returns the model with PEFT's LoRA on `targets`, r = alpha and no dropout."""
  import peft

  lora = peft.LoraConfig(
    r=request["rank"],
    lora_alpha=request["rank"],
    target_modules=targets,
    modules_to_save=[head],
  )
  return peft.get_peft_model(model, lora, autocast_adapter_dtype=False)


def make_peft(request: dict):
  """Returns (model, forward) of Hugging Face's ViT."""
  model = hugging_face(request)
  model = with_peft(model, request, query_and_value(model), "classifier")
  return model, lambda images: model(pixel_values=images).logits


def make_timm(request: dict):
  """Returns (model, forward) of timm's ViT; LoRA is on its one projection for all three."""
  import timm

  model = timm.models.vision_transformer.VisionTransformer(
    img_size=request["image_size"],
    patch_size=request["patch_size"],
    embed_dim=request["width"],
    depth=request["depth"],
    num_heads=request["num_heads"],
    mlp_ratio=request["mlp_ratio"],
    num_classes=request["num_classes"],
  )
  model = with_peft(model, request, ["qkv"], "head")
  return model, model


def make_sd_lora(request: dict):
  """Returns (model, forward) of SD-LoRA at task 20: a pair of products for each task so far.

  Old pairs are frozen and divided by their norms; each task's learned magnitude is one number for
  all layers. The norms are computed once; SD-LoRA's code computes them in every pass.
  """
  import torch

  class Stacked(torch.nn.Module):
    def __init__(self, plain, magnitudes):
      super().__init__()
      self.plain, self.magnitudes = plain, magnitudes
      width_in, width_out = plain.in_features, plain.out_features
      pairs = [
        (torch.randn(SD_LORA_RANK, width_in), torch.randn(width_out, SD_LORA_RANK))
        for _ in range(SD_LORA_TASK)
      ]
      pairs = [(a / a.norm(), b / b.norm()) for a, b in pairs]
      self.down = torch.nn.ParameterList([a for a, _ in pairs]).requires_grad_(False)
      self.up = torch.nn.ParameterList([b for _, b in pairs]).requires_grad_(False)
      self.down[-1].requires_grad_(True)
      self.up[-1].requires_grad_(True)

    def forward(self, x):
      linear = torch.nn.functional.linear
      y = self.plain(x)
      for magnitude, a, b in zip(self.magnitudes, self.down, self.up, strict=True):
        y = y + magnitude * linear(linear(x, a), b)
      return y

  model = hugging_face(request).requires_grad_(False)
  model.classifier.requires_grad_(True)
  magnitudes = torch.nn.ParameterList(
    [torch.full((1,), SD_LORA_START) for _ in range(SD_LORA_TASK)]
  )
  targets = query_and_value(model)
  for name, module in list(model.named_modules()):
    parent, _, last = name.rpartition(".")
    if last in targets:
      setattr(model.get_submodule(parent), last, Stacked(module, magnitudes))
  return model, lambda images: model(pixel_values=images).logits


MODELS = {"peft": make_peft, "timm": make_timm, "sd_lora": make_sd_lora}


def make_step(request: dict, variant: str):
  """Returns the function that does one training step of a variant on a fixed random batch."""
  import torch

  name = variant.removesuffix("_compiled")
  device = "cuda" if torch.cuda.is_available() else "cpu"
  dtype = getattr(torch, request["dtype"])
  torch.manual_seed(0)
  model, forward = MODELS[name](request)
  model.to(device, dtype).train()
  trained = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=1e-2, fused=True)
  if variant != name:
    forward = torch.compile(forward)
  shape = (request["batch"], 3, request["image_size"], request["image_size"])
  images = torch.randn(shape, device=device, dtype=dtype)
  labels = torch.arange(request["batch"], device=device) % request["num_classes"]

  def step():
    optimizer.zero_grad(set_to_none=True)
    torch.nn.functional.cross_entropy(forward(images).float(), labels).backward()
    optimizer.step()

  return step


def seconds(step, steps: int) -> float:
  """Returns the seconds that `steps` steps take, until the device has finished."""
  import torch

  wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
  wait()
  began = time.monotonic()
  for _ in range(steps):
    step()
  wait()
  return time.monotonic() - began


def prepare(request: dict) -> tuple[dict, dict]:
  """Returns the step functions of the variants that work, and the facts of this process."""
  import torch

  torch.set_float32_matmul_precision("high")  # TF32 on CUDA; a CPU has none
  steps, notes = {}, []
  for variant in request["variants"]:
    try:
      step = make_step(request, variant)
      began = time.monotonic()
      step()
      steps[variant] = step
      notes.append(f"{variant}: first step after {time.monotonic() - began:.1f} s")
    except Exception as error:  # a missing package, no compiler, or no memory
      reason = (str(error).strip() or repr(error)).splitlines()[0]
      notes.append(f"{variant} is left out: {reason[:120]}")
  device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
  modules = [importlib.import_module(name) for name in ("torch", "transformers", "peft")]
  return steps, {
    "variants": list(steps),
    "device": f"{device}, {torch.get_num_threads()} threads",
    "versions": {module.__name__: module.__version__ for module in modules},
    "notes": notes,
  }


def main() -> None:
  answers = os.fdopen(os.dup(1), "w")  # without what libraries print
  os.dup2(2, 1)

  def answer(record):
    answers.write(json.dumps(record) + "\n")
    answers.flush()

  steps, facts = prepare(json.loads(sys.argv[1]))
  answer(facts)
  with contextlib.suppress(KeyboardInterrupt):
    for line in sys.stdin:
      variant, count = json.loads(line)
      answer({"seconds": seconds(steps[variant], count)})


if __name__ == "__main__":
  main()
