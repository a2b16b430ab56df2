#!/usr/bin/env bash
# Runs an experiment on a Slurm cluster, from the root of the repository; arguments go to
# fmlora_jax.main. The repository and the workdir must be on storage that all nodes share:
#   sbatch launch/slurm.sh --config=configs/imagenet_r.py --workdir=runs/imagenet_r
# Any line below can be given to sbatch instead: sbatch --nodes=4 --gres=gpu:8 --ntasks-per-node=8 ...
#SBATCH --job-name=fmlora
#SBATCH --nodes=2
# One process a node on CPUs. On GPUs as many as a node has: jax gives each process the GPU of its
# number on the node, so every process must see them all (--gres=gpu:8, never --gpus-per-task).
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
# After a preemption or the loss of a node Slurm starts the job again, and it resumes.
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
# Slurm runs a copy of this file, so its own place says nothing. On GPUs: EXTRAS=cuda sbatch ...
source "$SLURM_SUBMIT_DIR/launch/environment.sh" "${EXTRAS:-}"
code=0
# processes end themselves when one of them does; srun ends those that can't
srun --kill-on-bad-exit=1 "$venv/bin/python" -m fmlora_jax.main "$@" || code=$?
# 75: another process ended; 137: killed, for want of memory say. What a user must mend is 2.
if ((code == 75 || code == 137)) && ((${SLURM_RESTART_COUNT:-0} < 3)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
