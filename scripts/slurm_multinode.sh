#!/usr/bin/env bash
# Step 1 of a recipe on several SLURM nodes, one task per GPU; lists and teacher must exist (run_dphubert.sh makes them).
# It saves and requeues itself when its time is up or it is preempted.
#   sbatch --nodes 2 scripts/slurm_multinode.sh conf/dphubert_base.yaml --trainer.batches_per_update 8 --data.seconds_per_batch 80
#SBATCH --job-name=dphubert
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --mem=128G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
cd "${SLURM_SUBMIT_DIR:-.}"
source scripts/common.sh
case "${1:-}" in -h | --help) usage scripts/slurm_multinode.sh; exit 0 ;; esac
[ $# -ge 1 ] || { usage scripts/slurm_multinode.sh >&2; exit 2; }
setup requirements.txt
recipe=$1
shift
code=0
# --wait: when one task is gone, the others do not wait for it longer than this many seconds
srun --wait=60 python distill.py --config "$recipe" --trainer.num_nodes "$SLURM_NNODES" --trainer.devices 4 "$@" || code=$?
requeue "$code"
