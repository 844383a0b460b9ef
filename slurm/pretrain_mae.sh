#!/bin/bash
# Pretrain on Slurm: sbatch [--nodes N] slurm/pretrain_mae.sh [CONFIG] [key=value ...]
# Example: sbatch --nodes 2 slurm/pretrain_mae.sh configs/mae_vit_b.toml data.store=/data/stores/brains
# One task per GPU. The signal, scancel's TERM and the end of the job make all ranks save together and end with 75 ("stopped
# early"): submit the same line again to continue. Edit partition, account and the lines marked "site" for your cluster.
#SBATCH --job-name=brainscale-mae
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=1-00:00:00
#SBATCH --signal=USR1@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail
CONFIG=${1:-configs/mae_tiny_cpu.toml}
shift || true
# site: module load, source .venv/bin/activate, container line
PYTHON=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
srun --kill-on-bad-exit=1 "$PYTHON" -m brainscale pretrain "$CONFIG" "$@"
