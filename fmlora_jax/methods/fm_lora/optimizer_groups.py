"""The optimizer groups of FM-LoRA: A, B, the cores and the prompt, in task 1 and later. Ours."""

from fmlora_jax.methods.fm_lora.settings import Config
from fmlora_jax.types import OptimizerGroup, Rules


def groups(settings: Config) -> dict[str, OptimizerGroup]:
  """Returns the groups by name; those of task 1 have rates of their own."""
  bases, core, prompt = settings.bases, settings.core, settings.prompt
  rates = {
    "a": bases.lr_scale,
    "b": bases.lr_scale * bases.b_lr_scale,
    "first_core": core.first_lr_scale,
    "core": core.lr_scale,
    "first_prompt": prompt.first_lr_scale,
    "prompt": prompt.lr_scale,
  }
  found = {name: OptimizerGroup(lr_scale=rate) for name, rate in rates.items()}
  for name in ("first_core", "core"):  # M starts at I, and decay would pull it to 0
    found[f"{name}_m"] = OptimizerGroup(lr_scale=rates[name], decays=False)
  return found


def rules(settings: Config, task: int) -> Rules:
  """Returns the group of each leaf: after task 1, or at rate 0, A and B are frozen."""
  first = "" if task else "first_"
  trained = not task and settings.bases.lr_scale > 0
  table = [
    *((f"shared/bases/.*/{side}", side if trained else "frozen") for side in "ab"),
    ("cur/core/.*/m", f"{first}core_m"),
    ("cur/core/.*/n", f"{first}core"),
  ]
  if settings.prompt.num_tokens:
    table.append(("shared/prompt", f"{first}prompt"))
  return tuple(table)
