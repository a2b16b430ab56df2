"""Bottleneck adapters that go through all tasks: Houlsby's and AdaptFormer's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmlora_jax import methods
from fmlora_jax.config import ConfigError
from fmlora_jax.models import heads

SITES = {"houlsby": {"attention", "mlp"}, "adaptformer": {"parallel"}}


def rows_of(made, seed=0):
  kernel = jax.random.normal(jax.random.key(seed), (3, made.backbone.sizes.width))
  return {"kernel": kernel, "bias": jnp.zeros(3)}


@pytest.mark.parametrize("kind", SITES)
def test_fresh_adapters_leave_the_pretrained_features_as_they_are(make_lab, kind):
  made = make_lab(method={"name": "adapter", "kind": kind, "width": 3})
  view = made.view(0)
  begun, _ = made.method.begin_task(made.variables, view)
  images, rows = made.images(), rows_of(made)
  variables = begun.replace(
    frozen=made.method.freeze(made.weights, begun), cur=begun.cur | {"head": rows}
  )
  got = jax.jit(made.method.apply)(variables, images, view.arrays, view.key("method")).logits
  plain = heads.linear(rows, jax.jit(made.backbone.apply)(made.weights, images))
  np.testing.assert_allclose(got, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kind", "scale"), [("houlsby", 1.0), ("adaptformer", 0.1)])
def test_what_adaptformer_adds_is_scaled_by_a_tenth(lab, kind, scale):
  made = lab("adapter", method={"kind": kind, "width": 3})
  found = made.method.fold(made.weights, made.variables)["memory"].bottlenecks
  assert set(found) == SITES[kind]
  for site, layers in found.items():
    trained = made.variables.shared["adapter"][site]
    assert layers.activation == {"houlsby": "gelu", "adaptformer": "relu"}[kind]
    for name, factor in (("down", 1), ("down_bias", 1), ("up", scale), ("up_bias", scale)):
      np.testing.assert_allclose(getattr(layers, name), factor * trained[name], rtol=1e-6)
      assert np.asarray(trained[name]).any()


@pytest.mark.parametrize(
  ("changes", "drops"),
  [
    ({"kind": "adaptformer"}, True),
    ({"kind": "houlsby"}, False),
    ({"kind": "adaptformer", "dropout": 0.0}, False),
    ({"kind": "houlsby", "dropout": 0.5}, True),
  ],
  ids=str,
)
def test_hidden_units_are_dropped_in_training_alone_and_where_the_kind_says(lab, changes, drops):
  made = lab("adapter", method=changes | {"width": 3})
  stage, images = made.stages[2], made.images(task=2)
  variables = stage.trained.replace(frozen=made.method.freeze(made.weights, stage.trained))
  apply = jax.jit(made.method.apply)
  first, again, other = (
    np.asarray(apply(variables, images, stage.view.arrays, jax.random.key(seed)).logits[:, :2])
    for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(first, again)
  assert (first != other).any() == drops
  tested = np.asarray(made.predictions(stage.ended, images))[:, 5:7]
  assert (np.abs(tested - first).max() > 1e-4) == drops


def test_layers_and_sites_drop_different_units(make_lab):
  made = make_lab(method={"name": "adapter", "width": 3, "dropout": 0.5})
  keys = []
  original = made.backbone.apply

  def spy(params, images, adapters=None):
    keys.extend(layers.dropout_keys for layers in adapters.bottlenecks.values())
    return original(params, images, adapters)

  method = methods.make_method(
    made.config, dataclasses.replace(made.backbone, apply=spy), made.spec
  )
  view = made.view(0)
  begun, _ = method.begin_task(made.variables, view)
  begun = begun.replace(frozen=method.freeze(made.weights, begun))
  method.apply(begun, made.images(), view.arrays, view.key("method"))
  assert len({bytes(np.asarray(jax.random.key_data(key))) for pair in keys for key in pair}) == 4


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"width": 0}, r"config\.method\.width is 0: must be >= 1"),
    ({"dropout": 1.0}, r"config\.method\.dropout is 1\.0: must be in \[0, 1\)"),
    ({"kind": "lora"}, r"config\.method\.kind is 'lora': must be one of houlsby, adaptformer"),
  ],
)
def test_settings_that_cannot_be_are_refused_by_field(make_lab, changes, message):
  with pytest.raises(ConfigError, match=message):
    make_lab(method={"name": "adapter"} | changes)


def test_layer_norms_train_with_houlsby_where_asked_and_are_used_at_test_time(make_lab):
  made = make_lab(method={"name": "adapter", "width": 3, "train_norms": True})
  norms = made.variables.shared["norms"]
  assert set(norms) == {"block_0", "block_1", "norm"}
  assert set(norms["block_1"]) == {"norm1", "norm2"}
  assert len(jax.tree.leaves(norms)) == 2 * (2 * 2 + 1)
  moved = jax.tree.map(lambda leaf: leaf + 0.5, norms)
  variables = made.variables.update(shared={"norms": moved})
  frozen = made.method.freeze(made.weights, variables)
  trunks = (
    made.method.trunk(variables.replace(frozen=frozen)),
    made.method.folded(made.weights, variables)[0],
  )
  for trunk in trunks:
    assert jax.tree.structure(trunk) == jax.tree.structure(made.weights)
    for name in ("block_0", "block_1"):
      np.testing.assert_array_equal(trunk[name]["norm2"]["scale"], moved[name]["norm2"]["scale"])
      np.testing.assert_array_equal(
        trunk[name]["fc1"]["dense"]["bias"], made.weights[name]["fc1"]["dense"]["bias"]
      )
    np.testing.assert_array_equal(trunk["norm"]["bias"], moved["norm"]["bias"])
  assert not made.method.groups["norm"].decays


@pytest.mark.parametrize("changes", [{}, {"kind": "adaptformer", "train_norms": True}], ids=str)
def test_layer_norms_stay_by_default_and_with_adaptformer(make_lab, changes):
  made = make_lab(method={"name": "adapter", "width": 3} | changes)
  assert set(made.variables.shared) == {"adapter"}
