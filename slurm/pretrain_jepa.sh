#!/bin/bash
# Pretrain a JEPA on Slurm: sbatch [options of sbatch] slurm/pretrain_jepa.sh [CONFIG] [key=value ...]
#   sbatch --nodes 2 --ntasks-per-node 8 --gpus-per-task 1 slurm/pretrain_jepa.sh configs/jepa_vcr_vit_b.toml data.store=/data/stores/brains
# Without arguments: a small model on the demo's store (make demo), on the CPU. One task is one rank, on one GPU if there are.
# The job ends when the run is done. When it is preempted, signalled (USR1, USR2, TERM), near its time limit or loses a node, it
# saves, is queued again under the same number, and continues; scancel ends it. What came of it stands in RUN/exit.json.
# A site edits the lines below (options of the sbatch command go before these), and those marked "site".
##SBATCH --partition=gpu
##SBATCH --account=project
##SBATCH --gpus-per-task=1
#SBATCH --job-name=brainscale-jepa
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=1-00:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail
[ $# -gt 0 ] || set -- configs/jepa_vcr_tiny_cpu.toml data.store=runs/demo/store run.dir=runs/jepa
# site: module load cuda
CONTAINER=() # site: for example (apptainer exec --nv brainscale.sif), with scontrol and squeue inside, and PYTHON=python
PYTHON=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1} SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take it over
if [ ${#CONTAINER[@]} = 0 ] && ! command -v "$PYTHON" >/dev/null; then
  echo "error: $PYTHON is not found in $PWD; submit from the checkout after 'make .venv/installed', or set PYTHON" >&2
  exit 2
fi

trap : USR1 USR2 TERM # the tasks save and leave; this shell waits for them
CODE=0
srun --kill-on-bad-exit=1 "${CONTAINER[@]}" "$PYTHON" -u -m brainscale pretrain "$@" || CODE=$?
"${CONTAINER[@]}" "$PYTHON" -m brainscale retry "$CODE" "$@" # after a failure: queued again where another start may do better
