#!/usr/bin/env bash
# Passes the tests on this machine; arguments go to pytest:
#   launch/test.sh tests/models -k golden
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" dev
export JAX_PLATFORMS=cpu
exec .venv/bin/python -m pytest -n 2 "$@"
