#!/usr/bin/env bash
# The published recipe on one SLURM node with 4 GPUs. It saves and requeues itself when its time is up or it is preempted.
#   sbatch scripts/slurm_dphubert.sh LIBRISPEECH_DIR [RECIPE] [FLAGS...]
#SBATCH --job-name=dphubert
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --mem=128G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# One task: Lightning starts a process per GPU itself. For several nodes use slurm_multinode.sh.
cd "${SLURM_SUBMIT_DIR:-.}"
source scripts/common.sh
unset SLURM_NTASKS SLURM_JOB_NAME # Lightning would expect one task per GPU
code=0
stage bash scripts/run_dphubert.sh "$@" || code=$?
requeue "$code"
