import dataclasses
from unittest import mock

import jax
import numpy as np
import pytest

from fmlora_jax.config import ConfigError
from fmlora_jax.train import mesh
from fmlora_jax.train.loop import NonFiniteError, Trainer


def learn(made, task=0):
  """Returns (state at the end, stats of all steps, lengths of the chunks) of one task."""
  view = made.view(task)
  variables, _ = made.method.begin_task(made.variables, view)
  chunks = list(made.trainer.train(made.trainer.init(variables, task), variables, view))
  stats = {name: np.concatenate([c[1][name] for c in chunks]) for name in ("loss", "grad_norm")}
  return chunks[-1][0], stats, [len(c[1]["loss"]) for c in chunks]


@pytest.fixture(scope="module")
def reference(make_lab):
  return learn(make_lab(method={"name": "lora", "rank": 2}, epochs=3))


@pytest.mark.parametrize(
  ("dispatch", "every", "mode", "lengths"),
  [
    (4, 0, "resident", [4, 2]),
    (1, 0, "resident", [1] * 6),
    (32, 0, "resident", [6]),
    (32, 4, "resident", [4, 2]),
    (3, 4, "resident", [3, 1, 2]),
    (3, 4, "stream", [3, 1, 2]),
    (32, 0, "stream", [6]),
  ],
)
def test_chunks_of_any_length_give_bit_identical_results(
  make_lab, reference, changed, dispatch, every, mode, lengths
):
  made = make_lab(
    method={"name": "lora", "rank": 2},
    epochs=3,
    input={"steps_per_dispatch": dispatch, "mode": mode},
    checkpoint={"every_steps": every},
  )
  state, stats, got = learn(made)
  assert got == lengths
  assert not changed(state, reference[0])
  for name, values in stats.items():
    np.testing.assert_array_equal(values, reference[1][name])
  assert made.setup.programs.num_compiled == 1  # also for a chunk that is cut short


def test_training_lowers_the_loss_and_sees_each_epoch(reference):
  _, stats, _ = reference
  assert len(stats["loss"]) == 6  # 24 images in batches of 16: 2 steps an epoch
  assert stats["loss"][0] == pytest.approx(np.log(2), rel=1e-5)
  assert stats["loss"][-2:].mean() < 0.9 * stats["loss"][:2].mean()


def test_training_goes_on_from_a_state_within_a_task(make_lab, reference, changed):
  made = make_lab(method={"name": "lora", "rank": 2}, epochs=3)
  view = made.view(0)
  variables, _ = made.method.begin_task(made.variables, view)
  state = next(made.trainer.train(made.trainer.init(variables, 0), variables, view))[0]
  assert int(state.step) == 4
  state = jax.tree.map(np.asarray, state)
  variables = variables.replace(**state.params)
  (resumed, stats, _), *more = made.trainer.train(state, variables, view)
  assert not more and len(stats["loss"]) == 2
  assert not changed(resumed, reference[0])
  np.testing.assert_array_equal(stats["loss"], reference[1]["loss"][4:])


def test_a_yielded_state_is_not_the_one_that_was_given(make_lab):
  """The chunk donates its own copy: what the caller handed in stays readable."""
  made = make_lab(method={"name": "linear_probe"}, epochs=1)
  view = made.view(0)
  variables, _ = made.method.begin_task(made.variables, view)
  state = made.trainer.init(variables, 0)
  *_, (last, _, _) = made.trainer.train(state, variables, view)
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((state, variables)))
  assert int(state.step) == 0 and int(last.step) == 2


def test_a_loss_that_is_not_finite_stops_with_task_and_step(make_lab):
  made = make_lab(method={"name": "lora", "rank": 2}, optim={"learning_rate": 1e30})
  with pytest.raises(NonFiniteError) as error:
    learn(made, task=1)
  assert "at task 2 of 3, step 2: must be finite" in str(error.value)
  assert "config.optim.learning_rate" in str(error.value)
  _, rows = next(made.view(1).train_chunks(0))
  shown = [f"record {row}" for row in made.sequence.tasks[1].train[rows[1][rows[1] >= 0]]]
  assert error.value.details["images"] == shown


def test_more_steps_than_can_be_counted_are_refused(make_lab, monkeypatch):
  monkeypatch.setattr(Trainer, "steps_per_epoch", lambda self, task: 2148)
  make_lab(epochs=999_000)
  with pytest.raises(ConfigError, match=r"config\.epochs is 1000000: must be less, a task would"):
    make_lab(epochs=1_000_000)


def test_the_same_seed_gives_the_same_batches_to_every_method(make_lab):

  def rows(name, **changes):
    view = make_lab(method={"name": name}, **changes).view(1)
    return np.stack([rows for _, rows in view.train_batches(1)])

  np.testing.assert_array_equal(rows("lora"), rows("fm_lora"))
  assert (rows("lora", seed=7) != rows("lora")).any()


def test_a_view_holds_one_task_and_no_test_image(make_lab):
  made = make_lab(method={"name": "linear_probe"})
  for index, task in enumerate(made.sequence.tasks):
    view = made.view(index)
    assert (int(view.arrays.index), int(view.arrays.lo), int(view.arrays.hi)) == (
      index, task.lo, task.hi
    )  # fmt: skip
    assert view.num_classes == task.hi - task.lo
    for part in ("train", "val"):
      examples, _ = next(getattr(view, f"{part}_batches")(0))
      count = len(getattr(task, part))
      assert int(examples.valid.sum()) == count
      pixels, _ = made.sequence.source.decode(getattr(task, part))
      np.testing.assert_array_equal(examples.images[:count], pixels)
  assert not any("test" in field.name for field in dataclasses.fields(view))


def test_tasks_of_different_size_have_arrays_of_one_shape(make_lab):
  made = make_lab(method={"name": "linear_probe"})
  firsts = [next(made.view(task).train_batches(0))[0] for task in range(3)]
  shapes = {examples.images.shape for examples in firsts}
  assert len(shapes) == 1


@pytest.mark.parametrize("mode", ["resident", "stream"])
def test_batches_that_are_padded_for_devices_train_the_same(
  make_lab, reference, monkeypatch, mode, leaves
):
  monkeypatch.setattr(mesh, "padded_size", lambda size, mesh: size + 2)
  made = make_lab(method={"name": "lora", "rank": 2}, epochs=3, input={"mode": mode})
  state, stats, _ = learn(made)
  expected = leaves(reference[0].params)
  np.testing.assert_allclose(stats["loss"], reference[1]["loss"], rtol=1e-5)
  for path, leaf in leaves(state.params).items():
    np.testing.assert_allclose(leaf, expected[path], rtol=0, atol=1e-4, err_msg=path)


@pytest.mark.parametrize("size", [1, 5, 6, 255, 256])
def test_a_padded_batch_is_the_next_that_devices_share(size):
  for count in (1, 2, 3, 4, 6, 8):
    padded = mesh.padded_size(size, mock.Mock(jax.sharding.Mesh, size=count))
    assert padded % count == 0 and size <= padded < size + count


@pytest.mark.parametrize("name", ["l2p", "dualprompt"])
@pytest.mark.parametrize("field", ["batch_size", "eval_batch_size"])
def test_a_batch_that_votes_is_not_padded(make_lab, field, name):
  small = {"l2p": {}, "dualprompt": {"general_layers": (0,), "expert_layers": (1,)}}[name]
  made = make_lab(method={"name": name, "batchwise": True} | small)
  config = dataclasses.replace(made.config, **{field: 6})
  message = f"config.{field} is 6: must be a multiple of the number of devices, 4"
  with pytest.raises(ConfigError, match=message):
    Trainer(
      config,
      made.sequence,
      made.weights,
      made.setup.programs,
      mesh=mock.Mock(jax.sharding.Mesh, size=4),
      root=made.root,
    )


def test_the_mesh_spans_all_devices():
  assert mesh.make_mesh().size == len(jax.devices())
  assert mesh.make_mesh().shape == {"data": len(jax.devices()), "fsdp": 1}
