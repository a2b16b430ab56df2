"""The settings of a run: their dataclasses, their checks, and how they are built from dicts."""

from fmlora_jax.config.build import build
from fmlora_jax.config.checks import (
  MOST_AT_ONCE,
  MOST_STEPS,
  MOST_WIDE,
  ConfigError,
  ConfigErrors,
  problems_of,
  raise_problems,
  require,
  require_path,
  require_within,
)
from fmlora_jax.config.head import AlignmentConfig, HeadConfig
from fmlora_jax.config.moved import moved_field, upgrade_config
from fmlora_jax.config.schema import (
  FREE_FIELDS,
  OWN_FIELDS,
  CheckpointConfig,
  Config,
  InputConfig,
  LowRankConfig,
  MeshConfig,
  MethodConfig,
  OptimConfig,
  Projection,
  TasksConfig,
  WeightsConfig,
)

__all__ = [
  "FREE_FIELDS",
  "MOST_AT_ONCE",
  "MOST_STEPS",
  "MOST_WIDE",
  "OWN_FIELDS",
  "AlignmentConfig",
  "CheckpointConfig",
  "Config",
  "ConfigError",
  "ConfigErrors",
  "HeadConfig",
  "InputConfig",
  "LowRankConfig",
  "MeshConfig",
  "MethodConfig",
  "OptimConfig",
  "Projection",
  "TasksConfig",
  "WeightsConfig",
  "build",
  "moved_field",
  "problems_of",
  "raise_problems",
  "require",
  "require_path",
  "require_within",
  "upgrade_config",
]
