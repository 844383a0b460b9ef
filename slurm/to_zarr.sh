#!/bin/bash
# Convert NIfTI into a store as a Slurm array: sbatch --array=0-7 slurm/to_zarr.sh SOURCE STORE [options of to_zarr.py]
# Example: sbatch --array=0-7 slurm/to_zarr.sh /data/bids /data/stores/brains --prep configs/prep/brain_1mm.toml
# The array's numbers must follow one another. The tasks write one store, and the last to end finishes it. What was killed
# continues by the same line; to start task 3 of 8 alone: SHARDS=8 sbatch --array=3 slurm/to_zarr.sh SOURCE STORE ...
#SBATCH --job-name=brainscale-to-zarr
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem-per-cpu=2G
#SBATCH --time=1-00:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log

set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: sbatch --array=0-7 slurm/to_zarr.sh SOURCE STORE [options of to_zarr.py]" >&2
  exit 2
fi
# site: module load, source .venv/bin/activate, container line
PYTHON=${PYTHON:-.venv/bin/python}
TASK=${SLURM_ARRAY_TASK_ID:-0}
if [ -z "${SHARDS:-}" ]; then # an array may begin at 1
  SHARDS=${SLURM_ARRAY_TASK_COUNT:-1}
  TASK=$((TASK - ${SLURM_ARRAY_TASK_MIN:-0}))
fi
exec "$PYTHON" data_prep/to_zarr.py "$@" --workers "${SLURM_CPUS_PER_TASK:-1}" --shard "$TASK/$SHARDS"
