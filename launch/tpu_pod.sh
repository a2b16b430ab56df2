#!/usr/bin/env bash
# Runs an experiment on all hosts of a Cloud TPU pod slice, from any machine with gcloud; arguments
# go to fmlora_jax.main. What must be there before: the TPU, the repository in REPOSITORY on each of
# its hosts (gcloud compute tpus tpu-vm scp --recurse --worker=all . NAME:fmlora_jax), and a folder
# that they share, such as a bucket mounted with gcsfuse or Filestore, for --workdir:
#   TPU=my-v5e-32 ZONE=us-west4-a launch/tpu_pod.sh --config=configs/imagenet_r.py --workdir=/mnt/runs/a
# The same command again resumes, on a slice of another size too.
set -euo pipefail
: "${TPU:?error: TPU is not set: must be the name of the pod slice}"
: "${ZONE:?error: ZONE is not set: must be its zone, such as us-west4-a}"
# jax asks the metadata server of each host how many there are and which it is
printf -v command 'cd %q && FMLORA_JAX_CLUSTER=auto EXTRAS=tpu launch/local.sh' "${REPOSITORY:-fmlora_jax}"
(($# == 0)) || printf -v command '%s%s' "$command" "$(printf ' %q' "$@")"
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$command"
