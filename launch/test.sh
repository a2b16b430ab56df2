#!/usr/bin/env bash
# Passes the tests on this machine; arguments go to pytest, paths are below the repository:
#   launch/test.sh tests/models -k golden
#   launch/test.sh --tier=2   (what takes minutes too; 3: what takes hours)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" dev
cd "$root"
export JAX_PLATFORMS=cpu
exec "$venv/bin/python" -m pytest -n 2 "$@"
