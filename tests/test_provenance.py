"""What a run says of itself."""

import numpy as np

from fmlora_jax.provenance import params_sha256


def test_the_hash_of_parameters_sees_names_shapes_types_and_bits():
  base = {"a": np.zeros(2, np.float32), "b": np.ones(3, np.float32)}
  hashes = {
    params_sha256(tree)
    for tree in (
      base,
      {"c": base["a"], "b": base["b"]},
      base | {"a": np.zeros((2, 1), np.float32)},
      base | {"a": np.zeros(2, np.int32)},
      base | {"a": np.array([0.0, -0.0], np.float32)},
    )
  }
  assert len(hashes) == 5
  assert params_sha256({"b": base["b"], "a": base["a"]}) in hashes
