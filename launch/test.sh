#!/usr/bin/env bash
# Runs the tests on this machine; arguments go to pytest, paths start at the repository's root:
#   launch/test.sh tests/models -k golden
#   launch/test.sh --tier=2   (with the tests that take minutes; 3: with those that take hours)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" dev
cd "$root"
export JAX_PLATFORMS=cpu
exec "$venv/bin/python" -m pytest -n 2 "$@"
