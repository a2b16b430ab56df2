"""--methods: names, variants and settings."""

import pytest

from fmlora_jax import methods
from fmlora_jax.cli.methods_flag import Choice, parse_methods
from fmlora_jax.config import ConfigError


def test_methods_stand_between_commas_and_their_settings_after_colons():
  text = "fm_lora,lora:mode=sequential:rank=8 lora:targets=('query', 'key'),fm_lora"
  assert parse_methods(text) == [
    Choice("fm_lora"),
    Choice("lora", (("mode", "sequential"), ("rank", "8"))),
    Choice("lora", (("targets", "('query', 'key')"),)),
  ]


def test_all_is_every_method_in_every_variant_that_it_declares(monkeypatch):
  chosen = parse_methods("all,fm_lora:prompt.num_tokens=0,lora:mode=sequential")
  assert {choice.name for choice in chosen} == set(methods.names())
  lora = [choice.settings for choice in chosen if choice.name == "lora"]
  assert lora == [(("mode", "incremental"),), (("mode", "sequential"),)]
  assert chosen[-1] == Choice("fm_lora", (("prompt.num_tokens", "0"),))
  assert len(chosen) == len(set(chosen))


@pytest.mark.parametrize(
  ("text", "message"),
  [
    (
      "lora,lorra",
      "--methods has 'lorra': must be all, NAME or NAME:FIELD=VALUE, where NAME is on",
    ),
    ("lora,rank=8", "--methods has 'rank=8': must be all, NAME or"),
    ("lora:rank", "--methods has 'lora:rank': must be like lora:mode=sequential:rank=8"),
    ("lora:=8", "--methods has 'lora:=8': must be like"),
    (
      "lora:rank=1:rank=2",
      "--methods has 'lora:rank=1:rank=2': method.rank is given 2 times: must",
    ),
    (
      "fm_lora:drs.rank=4:method.drs.rank=4",
      "--methods has 'fm_lora:drs.rank=4:method.drs.rank=4': method.drs.rank is given 2 times",
    ),
    (
      "lora:optim.learning_rate=1:optim.learning_rate=2",
      "--methods has 'lora:optim.learning_rate=1:optim.learning_rate=2': optim.learning_rate is gi",
    ),
    (" ,", "--methods is ' ,': must be all, or such as"),
  ],
)
def test_invalid_methods_are_refused(text, message):
  with pytest.raises(ConfigError) as error:
    parse_methods(text)
  assert str(error.value).startswith(message)


def test_a_tuple_may_be_given_item_by_item():
  (choice,) = parse_methods("lora:targets=query:targets=key")
  assert choice.changes == (("method.targets", "query"), ("method.targets", "key"))


def test_settings_become_changes_of_the_config():
  choice = Choice("fm_lora", (("rank", "8"), ("optim.decay", "0.5"), ("drs.rank", "4")))
  assert choice.changes == (
    ("method.rank", "8"),
    ("optim.decay", "0.5"),
    ("method.drs.rank", "4"),
  )
