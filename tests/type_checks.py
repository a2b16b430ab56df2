"""The check of the package's signatures in tests: shapes and dtypes too."""

from collections.abc import Callable

import flax.struct
import jax
import jaxtyping
import numpy as np
from beartype import BeartypeConf, beartype

CONF = BeartypeConf(is_pep484_tower=True)  # an int is a float
ARRAYS_AND_META = (jax.Array, np.ndarray, float, str)


def install() -> None:
  """Has all modules of the package checked that are imported from now on."""
  jaxtyping.Array = jax.Array | np.ndarray  # jax takes either, and so do functions that call it
  jaxtyping.install_import_hook("fmlora_jax", "type_checks.check")


def check(function: Callable) -> Callable:
  """Returns the function with its arguments and result checked.

  A record is made with shardings, shapes, axes or None for arrays when jax maps over it, and is
  then not checked.
  """
  checked = beartype(function, conf=CONF)
  if function.__name__ != "__init__":
    return checked

  def check_fields(self, *args, **fields):
    leaves = jax.tree.leaves((args, fields))
    holds_arrays = leaves and all(isinstance(leaf, ARRAYS_AND_META) for leaf in leaves)
    if holds_arrays or not isinstance(self, flax.struct.PyTreeNode):
      checked(self, *args, **fields)

  return check_fields
