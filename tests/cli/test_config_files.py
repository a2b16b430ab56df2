"""Config files: the functions that they call, and a build of each that ships."""

import dataclasses
import importlib.util
import pathlib
import types
import typing

import jax
import jax.numpy as jnp
import ml_collections
import pytest

from fmlora_jax import config, methods
from fmlora_jax.cli import config_files, config_flag
from fmlora_jax.methods import linear_probe, lora
from fmlora_jax.models import vit
from fmlora_jax.models.weights import registry
from fmlora_jax.types import SequenceSpec

CONFIGS = [
  path
  for path in sorted(pathlib.Path(__file__).parents[2].glob("configs/*.py"))
  if not path.stem.startswith("pretrain_")  # recipes of fmlora_jax.pretrain
]
every_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def load(path: pathlib.Path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@every_config
def test_every_config_file_builds_and_takes_a_method(path):
  chosen = load(path).get_config("method=lora")
  built = methods.build_config(chosen.to_dict())
  assert built.method.name == "lora" and built.method.mode == "incremental"
  assert methods.build_config(load(path).get_config().to_dict()).method.name == "fm_lora"


@every_config
def test_every_config_file_fits_its_vit(path):
  """By shape: the method is made, started and applied, and no number is computed."""
  built = methods.build_config(load(path).get_config().to_dict())
  tag = built.weights.tag
  name = (registry.WEIGHTS[tag].architecture if tag else None) or built.weights.architecture
  backbone = vit.make_vit(vit.architecture(name), jnp.dtype(built.compute_dtype))
  count = built.tasks.num_tasks
  shared = built.tasks.scenario == "dil"
  spec = SequenceSpec(
    scenario=built.tasks.scenario,
    num_tasks=count,
    num_classes=2 if shared else 2 * count,
    class_ranges=tuple((0, 2) if shared else (2 * i, 2 * i + 2) for i in range(count)),
  )
  method = methods.make_method(built, backbone, spec)
  weights = jax.eval_shape(backbone.init, jax.random.key(0))
  variables = jax.eval_shape(method.init, jax.random.key(0), weights)
  images = jax.ShapeDtypeStruct((3, *[backbone.sizes.image_size] * 2, 3), jnp.float32)
  folded = jax.eval_shape(method.fold, weights, variables)
  logits = jax.eval_shape(method.predict, folded, images)
  assert (logits.shape, logits.dtype) == ((3, spec.num_classes), jnp.float32)


def test_the_defaults_are_those_of_the_dataclasses():
  built = methods.build_config(config_files.defaults().to_dict())
  assert dataclasses.asdict(built) == dataclasses.asdict(methods.build_config({}))
  assert isinstance(built.method, methods.config_class("fm_lora"))


def parse(**changes) -> config.Config:
  """Returns the config that --config.FIELD=VALUE make of the defaults; "__" stands for a dot."""
  pairs = [(field.replace("__", "."), value) for field, value in changes.items()]
  return config_flag.change_config(config_files.defaults(), pairs)


def test_fields_that_are_none_can_be_set_from_the_command_line_with_their_type():
  """Every one there is."""
  examples = {int: ("7", 7), float: ("1", 1.0), str: ("half", "half")}
  found = []
  tree = config.Config()
  for group in dataclasses.fields(config.Config):
    record = getattr(tree, group.name)
    if dataclasses.is_dataclass(record):
      hints = typing.get_type_hints(type(record))
      found += [
        (group.name, field.name, hints[field.name])
        for field in dataclasses.fields(record)
        if getattr(record, field.name) is None
      ]
  assert len(found) >= 8
  for group, field, hint in found:
    (kind,) = (k for k in typing.get_args(hint) if k is not types.NoneType)
    choices = typing.get_args(kind)  # of a Literal
    given, expected = (choices[-1], choices[-1]) if choices else examples[kind]
    built = parse(**{f"{group}.{field}": given})
    value = getattr(getattr(built, group), field)
    assert value == expected and type(value) is type(expected), (group, field)


def test_a_field_that_is_none_keeps_its_type_in_a_config_file():
  tree = config_files.defaults()
  tree.tasks.order_seed = 5
  with pytest.raises(TypeError):
    tree.tasks.order_seed = "five"
  assert methods.build_config(tree.to_dict()).tasks.order_seed == 5


def test_tuples_can_be_set_from_the_command_line():
  built = parse(method__drs__candidate_ranks="(2,4)", method__bases__targets="('key','out')")
  assert built.method.drs.candidate_ranks == (2, 4)
  assert built.method.bases.targets == ("key", "out")


def test_a_config_file_with_a_typo_is_refused():
  with pytest.raises(config.ConfigError, match="config.optim.learning_rat is not a field"):
    config_files.defaults(optim={"learning_rat": 1.0})


def test_a_method_of_a_config_file_has_its_own_fields():
  tree = config_files.defaults(method={"name": "lora", "rank": 3})
  assert isinstance(tree, ml_collections.ConfigDict)
  assert tree.method.rank == 3 and tree.method.mode == "incremental"


def test_all_methods_have_the_head_lda_unless_a_variant_names_one():
  aligned, lda = {"alignment": {"epochs": 9}}, {"kind": "lda"}
  heads = {"plain": {"start": "zero"}, "aligned": aligned, "lda": lda, "hide_prompt": {}}

  def named(*default, **chosen):
    found = config_files.head_settings(chosen, heads, *default)
    return next(name for name, head in heads.items() if head is found)

  assert named() == named(method="fm_lora") == named(method="lora") == "lda"
  assert named(head="plain") == named("plain") == named("plain", method="lora") == "plain"
  assert named("plain", head="aligned") == "aligned"
  assert named(method="hide_prompt", head="aligned") == "hide_prompt"
  with pytest.raises(config.ConfigError, match="head is 'flat': must be plain, aligned or lda"):
    config_files.head_settings({"head": "flat"}, heads)


@pytest.mark.parametrize("name", ["digits", "digits_dil", "fashion_mnist", "image_folder"])
def test_the_methods_of_a_config_have_one_head(name):
  """But hide_prompt, whose own part it is."""
  (path,) = (path for path in CONFIGS if path.stem == name)
  names = [method for method in methods.names() if method != "hide_prompt"]
  heads = [load(path).get_config(f"method={method}").head.to_dict() for method in names]
  assert all(head == heads[0] for head in heads)


@pytest.mark.parametrize("name", ["digits", "digits_dil", "fashion_mnist", "image_folder"])
@pytest.mark.parametrize("head", ["plain", "aligned", "lda"])
def test_a_head_is_aligned_where_it_is_asked_for_and_never_twice(name, head):
  """hide_prompt, which has an alignment of its own, refuses another beside it."""
  (path,) = (path for path in CONFIGS if path.stem == name)
  for method in methods.names():
    chosen = load(path).get_config(f"method={method},head={head}")
    built = methods.build_config(chosen.to_dict())
    aligned = head == "aligned" and method != "hide_prompt"
    assert bool(built.head.alignment.epochs) == aligned


def test_a_folder_of_images_is_learned_with_the_head_lda_unless_tasks_are_given():
  (path,) = (path for path in CONFIGS if path.stem == "image_folder")
  variants = ("", "method=lora", "scenario=dil", "scenario=til", "scenario=til,head=aligned")
  chosen = [load(path).get_config(variant).head for variant in variants]
  assert [head.kind for head in chosen] == ["lda", "lda", "lda", "linear", "linear"]
  assert [head.alignment.epochs for head in chosen] == [0, 0, 0, 0, 30]


def test_a_variant_is_read_as_pairs():
  assert config_files.parse_variant("method=lora,tasks=2", "method", "tasks") == {
    "method": "lora",
    "tasks": "2",
  }
  assert config_files.parse_variant(None) == {}
  with pytest.raises(config.ConfigError, match="key=value"):
    config_files.parse_variant("lora")
  with pytest.raises(config.ConfigError, match="'tasks=': must be key=value"):
    config_files.parse_variant("tasks=", "tasks")
  with pytest.raises(config.ConfigError, match="'tasks=5': tasks must be given once, is 2 too"):
    config_files.parse_variant("tasks=2,tasks=5", "tasks")
  for count in ("2;method=lora", "two", "-1", "2.5"):
    with pytest.raises(config.ConfigError, match="tasks must be a whole number, as in method=lora"):
      config_files.parse_variant(f"tasks={count}", "tasks")
  with pytest.raises(config.ConfigError, match="the key must be one of method"):
    config_files.parse_variant("metod=lora", "method")


OFFICIAL = {
  "imagenet_r": {
    "epochs": 50,
    "optim": {"name": "sgd", "schedule": "steps", "milestones": (20,)},
    "method": {"rank": 10},
    "input": {"augmentation": "coda"},
    "tasks": {"order": "natural", "split": "slice80"},
    "weights": {"tag": "augreg_in21k"},
  },
  "cifar100": lambda num_tasks: {"epochs": 2 * num_tasks},
}
PAPER = [path for path in CONFIGS if "config_files.paper(" in path.read_text()]


@pytest.fixture
def official(monkeypatch):
  """As if lora had official settings for two benchmarks."""
  monkeypatch.setattr(lora, "OFFICIAL", OFFICIAL, raising=False)


def paper_config(name, variant) -> config.Config:
  (path,) = [path for path in CONFIGS if path.stem == name]
  return methods.build_config(load(path).get_config(variant).to_dict())


def test_the_official_recipe_changes_what_it_names_and_nothing_else(official):
  unified = paper_config("imagenet_r", "method=lora,tasks=20")
  built = paper_config("imagenet_r", "method=lora,tasks=20,recipe=official")
  assert (built.epochs, built.method.rank, built.weights.tag) == (50, 10, "augreg_in21k")
  assert (built.optim.name, built.optim.milestones) == ("sgd", (20,))
  assert (built.tasks.order, built.tasks.split, built.tasks.num_tasks) == ("natural", "slice80", 20)
  assert built.input == dataclasses.replace(unified.input, augmentation="coda")
  assert built.optim.learning_rate == unified.optim.learning_rate
  assert built.method.mode == unified.method.mode
  assert unified == paper_config("imagenet_r", "method=lora,tasks=20,recipe=unified")


def test_the_official_recipe_may_depend_on_the_number_of_tasks(official):
  assert paper_config("cifar100", "method=lora,tasks=20,recipe=official").epochs == 40
  assert paper_config("cifar100", "method=lora,recipe=official").epochs == 20


def test_a_split_that_is_asked_for_wins_over_the_recipe_s(official):
  built = paper_config("imagenet_r", "method=lora,recipe=official,split=stratified")
  assert (built.tasks.split, built.tasks.order) == ("stratified", "natural")


@pytest.mark.parametrize(
  ("name", "variant", "message"),
  [
    ("cifar100", "recipe=best", "recipe is 'best': must be one of unified, official"),
    ("cub200", "recipe=official", "recipe is 'official': must be unified, lora has none for 'cub2"),
    (
      "domainnet_dil",
      "recipe=official",
      "learn new classes in each task (cil), and the scenario i",
    ),
    ("cub200", "recpe=official", "the key must be one of method, tasks, split, recipe"),
  ],
)
def test_a_recipe_that_there_is_not_is_refused(official, name, variant, message):
  with pytest.raises(config.ConfigError) as error:
    paper_config(name, f"method=lora,{variant}")
  assert message in str(error.value)


def test_a_method_without_official_settings_says_so(monkeypatch):
  monkeypatch.delattr(linear_probe, "OFFICIAL", raising=False)
  with pytest.raises(config.ConfigError, match="must be unified, linear_probe has none$"):
    paper_config("cub200", "method=linear_probe,recipe=official")


def test_every_config_of_the_paper_takes_a_recipe_and_its_own_number_of_tasks():
  counts = {path.stem: paper_config(path.stem, "recipe=unified").tasks.num_tasks for path in PAPER}
  assert counts == {
    "cifar100": 10,
    "cub200": 10,
    "domainnet": 5,
    "domainnet_dil": 6,
    "imagenet_r": 10,
  }
