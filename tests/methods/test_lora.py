"""Plain LoRA: how its A starts; the rest is in the contract tests."""

import jax
import numpy as np
import pytest

from fmlora_jax.config import ConfigError
from fmlora_jax.methods import lora


def start_of(make_lab, **changes):
  made = make_lab(method={"name": "lora", "rank": 8} | changes)
  return {n: np.asarray(f["a"]) for n, f in made.method.fresh(jax.random.key(0)).items()}


def test_the_default_is_normal_with_columns_of_norm_one(make_lab):
  for a in start_of(make_lab).values():  # 2 layers, width 16, rank 8
    assert np.abs(a).max() > 2 * 16**-0.5
    np.testing.assert_allclose(a.std(), 16**-0.5, rtol=0.15)


def test_torch_linear_fills_the_kaiming_bound(make_lab):
  for a in start_of(make_lab, init="torch_linear").values():
    assert 0.9 * 16**-0.5 < np.abs(a).max() <= 16**-0.5
    np.testing.assert_allclose(a.std(), (3 * 16) ** -0.5, rtol=0.15)


def test_an_unknown_start_is_refused(make_lab):
  with pytest.raises(ConfigError, match=r"config\.method\.init is 'zero': must be"):
    make_lab(method={"name": "lora", "init": "zero"})
  assert set(lora.DRAWS) == {"normal", "torch_linear"}
