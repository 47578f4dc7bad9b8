#!/usr/bin/env bash
# Slurm, four nodes with eight GPUs each:
#
#     sbatch training/launch/slurm.sh training/pretrain.py CONFIG
#     sbatch --nodes 8 --time 48:00:00 training/launch/slurm.sh training/instruct.py CONFIG
#
# Two minutes before the time is up, and when the job is preempted, the processes get SIGTERM: they finish the step, save, and exit
# with 143; the job is queued again and goes on from there. SHARDING, OFFLOAD and GPUS as in torchrun.sh.
#SBATCH --job-name=mmllm
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail

cd "${SLURM_SUBMIT_DIR:?start this with sbatch}"
HEAD="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):29500"
export HEAD NODES="$SLURM_NNODES" RUN_ID="$SLURM_JOB_ID"
[ $# -gt 0 ] || { echo "usage: sbatch $0 SCRIPT CONFIG [a.b=c ...]" >&2; exit 2; }

stopped=no
srun --kill-on-bad-exit=1 training/launch/torchrun.sh "$@" --resume &
steps=$!
trap 'stopped=yes; kill -TERM "$steps"' TERM  # srun hands it on to every process
wait "$steps"
code=$?
if [ "$stopped" = yes ]; then
  wait "$steps"
  code=$?
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
