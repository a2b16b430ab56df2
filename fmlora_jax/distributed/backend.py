"""First use of jax's backend: what it can't use is refused in one line."""

import os
import re

from fmlora_jax.config import ConfigError

PLATFORMS = "JAX_PLATFORMS"
XLA_FLAGS = "XLA_FLAGS"
FAKE_DEVICES = re.compile(r"xla_force_host_platform_device_count=(\S*)")
_INSTALLED_BY = {"cuda": "fmlora_jax[cuda]", "gpu": "fmlora_jax[cuda]", "tpu": "fmlora_jax[tpu]"}


def require_backend() -> None:
  """Has jax use the devices that JAX_PLATFORMS names, where it is set.

  To be called after the processes have joined.

  Raises:
    ConfigError: if there is no such device, or XLA_FLAGS have a number of devices that XLA refuses.
  """
  _require_devices_of_cpu()
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


def _require_devices_of_cpu() -> None:
  """Refuses a number of devices at which XLA ends the process with a dump of its C++ stack."""
  flags = os.environ.get(XLA_FLAGS, "")
  for count in FAKE_DEVICES.findall(flags):
    if not re.fullmatch("[0-9]*[1-9][0-9]*", count):
      raise ConfigError(
        f"{XLA_FLAGS} is {flags!r}: xla_force_host_platform_device_count must be a whole number "
        ">= 1; correct it or leave it out"
      )


def _fix(wanted: str) -> str:
  packages = {_INSTALLED_BY[name] for name in wanted.split(",") if name in _INSTALLED_BY}
  if not packages:
    return "unset it, or set it to cpu, cuda or tpu"
  return f"unset it, or install jax for it: pip install '{min(packages)}'"
