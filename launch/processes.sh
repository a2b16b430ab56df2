#!/usr/bin/env bash
# Runs an experiment as several processes on this machine, joined at 127.0.0.1: a rehearsal of a
# cluster. Process i gets the i-th GPU. The first argument is the number of processes, the others go
# to fmlora_jax.main:
#   launch/processes.sh 2 --config=configs/digits.py
# One process can drive all GPUs of a machine too: launch/local.sh is the simpler choice.
set -euo pipefail
if [[ ! ${1:-} =~ ^[1-9][0-9]*$ ]]; then
  echo "error: the first argument is '${1:-}': must be the number of processes, as in $0 2 ..." >&2
  exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" "${EXTRAS:-}"
port=$("$venv/bin/python" -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$1
shift
processes=()
trap 'kill "${processes[@]}" 2>/dev/null' INT TERM
for ((i = 0; i < JAX_NUM_PROCESSES; i++)); do
  JAX_PROCESS_ID=$i JAX_LOCAL_DEVICE_IDS=$i "$venv/bin/python" -m fmlora_jax.main "$@" &
  processes+=($!)
done
code=0
for process in "${processes[@]}"; do
  wait "$process" || code=$?
done
exit "$code"
