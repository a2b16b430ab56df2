"""The check of the package's signatures in tests: shapes and dtypes too."""

import inspect
from collections.abc import Callable

import flax.struct
import jax
import jaxtyping
import numpy as np
from beartype import BeartypeConf, beartype

CONF = BeartypeConf(
  is_pep484_tower=True,  # an int is a float
  violation_type=TypeError,  # as of jaxtyping and of an operation on a wrong type
)
ARRAYS_AND_META = (jax.Array, np.ndarray, float, str)
of_arrays = jaxtyping.jaxtyped


def install() -> None:
  """Has all modules of the package checked that are imported from now on."""
  jaxtyping.Array = jax.Array | np.ndarray  # jax takes either, and so do functions that call it
  jaxtyping.jaxtyped = jaxtyped  # which the hook decorates with
  jaxtyping.install_import_hook("fmlora_jax", "type_checks.check")


def jaxtyped(*, typechecker: Callable) -> Callable:
  """Returns jaxtyping's decorator, but leaves out what costs time and checks next to nothing.

  Functions without arrays are checked by beartype alone. Functions within functions, which would
  be decorated at each call of the outer one, are not checked.
  """

  def decorate(thing):
    if inspect.isfunction(thing) and "<locals>" in thing.__qualname__:
      return thing
    if inspect.isfunction(thing) and "jaxtyping." not in repr(thing.__annotations__):
      return check(thing)
    return of_arrays(thing, typechecker=typechecker)

  return decorate


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
