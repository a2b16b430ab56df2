#!/usr/bin/env bash
# Runs an experiment on this machine; arguments go to fmlora_jax.main:
#   launch/local.sh --config=configs/digits.py --config.seed=1994
# On a CUDA machine: EXTRAS=cuda launch/local.sh ...; on a TPU host: EXTRAS=tpu.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" "${EXTRAS:-}"
exec "$venv/bin/python" -m fmlora_jax.main "$@"
