#!/usr/bin/env bash
# Runs an experiment on all hosts of a Cloud TPU pod slice, from any machine with gcloud; arguments
# go to fmlora_jax.main. Needs the TPU, the repository in the folder REPOSITORY (fmlora_jax) on each
# host (gcloud compute tpus tpu-vm scp --recurse --worker=all . NAME:fmlora_jax), and for --workdir a
# folder that the hosts share, such as Filestore or a bucket mounted with gcsfuse:
#   TPU=my-v5e-32 ZONE=us-west4-a launch/tpu_pod.sh --config=configs/imagenet_r.py --workdir=/mnt/runs/a
# The same command again resumes, also on a slice of another size.
set -euo pipefail
if [[ -z ${TPU:-} || -z ${ZONE:-} ]]; then
  echo "error: TPU is '${TPU:-}', ZONE is '${ZONE:-}': must be the pod slice's name and its zone, such as us-west4-a" >&2
  exit 2
fi
# each host learns its number and the total from its metadata server
printf -v command 'cd %q && FMLORA_JAX_CLUSTER=auto EXTRAS=tpu launch/local.sh' "${REPOSITORY:-fmlora_jax}"
(($# == 0)) || printf -v command '%s%s' "$command" "$(printf ' %q' "$@")"
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$command"
