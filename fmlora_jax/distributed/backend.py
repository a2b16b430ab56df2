"""First use of jax's backend: a platform that is not there is refused in one line."""

import os

from fmlora_jax.config import ConfigError

PLATFORMS = "JAX_PLATFORMS"
_INSTALLED_BY = {"cuda": "fmlora_jax[cuda]", "gpu": "fmlora_jax[cuda]", "tpu": "fmlora_jax[tpu]"}


def require_backend() -> None:
  """Has jax use the devices that JAX_PLATFORMS names, where it is set.

  To be called after the processes have joined.

  Raises:
    ConfigError: if there is no such device.
  """
  wanted = os.environ.get(PLATFORMS)
  if not wanted:
    return
  import jax  # takes a second, which --help does without

  try:
    jax.devices()
  except (AssertionError, RuntimeError) as error:  # without a reason, or with one
    reason = " ".join(str(error).split()).partition(" (set JAX_PLATFORMS")[0][:200]
    raise ConfigError(
      f"{PLATFORMS} is {wanted!r}: no such device here; {_fix(wanted)}{reason and f' ({reason})'}"
    ) from error


def _fix(wanted: str) -> str:
  packages = {_INSTALLED_BY[name] for name in wanted.split(",") if name in _INSTALLED_BY}
  if not packages:
    return "unset it, or set it to cpu, cuda or tpu"
  return f"unset it, or install jax for it: pip install '{min(packages)}'"
