"""--methods=NAME:FIELD=VALUE,...: methods to run, each with its settings."""

import dataclasses
import re

from fmlora_jax import methods
from fmlora_jax.config import Config, ConfigError, moved_field
from fmlora_jax.config.diff import leaves


@dataclasses.dataclass(frozen=True)
class Choice:
  """A method with its settings.

  Attributes:
    settings: (field, value) as text; a field without a dot is the method's.
  """

  name: str
  settings: tuple[tuple[str, str], ...] = ()

  def __str__(self) -> str:
    return ":".join([self.name, *("=".join(setting) for setting in self.settings)])

  @property
  def changes(self) -> tuple[tuple[str, str], ...]:
    """The settings as --config.FIELD=VALUE has them: (FIELD, VALUE)."""
    return tuple(
      (moved_field(field) if "." in field else f"method.{field}", value)
      for field, value in self.settings
    )


def parse_methods(text: str) -> list[Choice]:
  """Returns the methods that --methods names, each once.

  They are NAME or NAME:FIELD=VALUE:..., separated by commas or blanks outside of brackets; "all" is
  every method in every variant that its file declares.

  Raises:
    ConfigError: if a method is unknown, a setting is not FIELD=VALUE or is given twice.
  """
  known, chosen = methods.names(), []
  for part in filter(None, re.split(r"[,\s]+(?![^(]*\))", text)):
    name, *settings = part.split(":")
    if part == "all":
      for each in known:
        for variant in methods.variants(each):
          chosen.append(Choice(each, tuple((k, str(v)) for k, v in variant.items())))
      continue
    if name not in known:
      raise ConfigError(
        f"--methods has {part!r}: must be all, NAME or NAME:FIELD=VALUE, where NAME is one of "
        f"{', '.join(known)}"
      )
    pairs = [setting.partition("=") for setting in settings]
    if any(not (field and equals) for field, equals, _ in pairs):
      raise ConfigError(f"--methods has {part!r}: must be like lora:mode=sequential:rank=8")
    chosen.append(Choice(name, tuple((field, value) for field, _, value in pairs)))
    _refuse_repeated(chosen[-1])
  if not chosen:
    raise ConfigError(
      f"--methods is {text!r}: must be all, or such as fm_lora,lora:mode=sequential"
    )
  return list(dict.fromkeys(chosen))


def _refuse_repeated(choice: Choice) -> None:
  """Refuses a field that a method gets twice, unless it is a tuple, which is extended.

  Raises:
    ConfigError: with the field.
  """
  config = Config(method=methods.config_class(choice.name)())
  values = dict(leaves(dataclasses.asdict(config)))
  fields = [field for field, _ in choice.changes]
  for field in fields:
    if fields.count(field) > 1 and not isinstance(values.get(field), tuple):
      raise ConfigError(
        f"--methods has '{choice}': {field} is given {fields.count(field)} times: must be given "
        "once; for runs with each, separate methods by commas"
      )
