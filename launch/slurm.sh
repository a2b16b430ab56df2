#!/usr/bin/env bash
# Runs an experiment on a Slurm cluster, from the root of the repository; arguments go to
# fmlora_jax.main. All nodes must share the repository and the workdir:
#   sbatch launch/slurm.sh --config=configs/imagenet_r.py --workdir=runs/imagenet_r
# Any line below can be given to sbatch instead: sbatch --nodes=4 --gres=gpu:8 --ntasks-per-node=8 ...
#SBATCH --job-name=fmlora
#SBATCH --nodes=2
# CPUs: one process per node. GPUs: one process per GPU; JAX gives each process the GPU of its number
# on the node, so every process must see them all (--gres=gpu:8, never --gpus-per-task).
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
# After a preemption or a node failure Slurm starts the job again, and it resumes.
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
if [[ -z ${SLURM_SUBMIT_DIR:-} ]]; then
  echo "error: SLURM_SUBMIT_DIR is not set: start this with sbatch launch/slurm.sh ..." >&2
  exit 2
fi
# Slurm runs a copy of this file, so BASH_SOURCE does not help. On GPUs: EXTRAS=cuda sbatch ...
source "$SLURM_SUBMIT_DIR/launch/environment.sh" "${EXTRAS:-}"
code=0
# processes stop by themselves when one of them exits; srun kills those that hang
srun --kill-on-bad-exit=1 "$venv/bin/python" -m fmlora_jax.main "$@" || code=$?
# 75: another process exited; 137: killed, by the out-of-memory killer for one. A user's error is 2.
if ((code == 75 || code == 137)) && ((${SLURM_RESTART_COUNT:-0} < 3)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
