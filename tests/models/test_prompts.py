import numpy as np
import pytest

from fmlora_jax.models import prompts


@pytest.mark.parametrize("batch", [1, 3])
def test_prefixes_keep_samples_keys_and_values_apart(batch):
  tokens = np.random.default_rng(0).normal(size=(batch, 2, 2, 5, 12))
  found = prompts.prefixes(tokens, (1, 3), num_heads=4)
  assert [layer is None for layer in found] == [True, False, True, False]
  for row, layer in enumerate((1, 3)):
    for sample in range(batch):
      for part, name in enumerate(("key", "value")):
        for head in range(4):
          np.testing.assert_array_equal(
            getattr(found[layer], name)[sample, :, head],
            tokens[sample, row, part, :, 3 * head : 3 * head + 3],
          )
