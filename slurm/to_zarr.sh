#!/bin/bash
# Convert NIfTI into a store as a Slurm array: sbatch --array=0-7 slurm/to_zarr.sh SOURCE STORE [options of to_zarr.py]
#   sbatch --array=0-7 slurm/to_zarr.sh /data/bids /data/stores/brains --prep configs/prep/brain_1mm.toml
# The array's numbers must follow one another. The tasks write one store, and the last to end finishes it. A task that is
# preempted, loses its node or nears its time limit is queued again and continues; what was killed for good continues by the same
# line; to start task 3 of 8 alone: SHARDS=8 sbatch --array=3 slurm/to_zarr.sh SOURCE STORE ...
# A site edits the lines below (options of the sbatch command go before these), and those marked "site".
##SBATCH --partition=cpu
##SBATCH --account=project
#SBATCH --job-name=brainscale-to-zarr
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem-per-cpu=2G
#SBATCH --time=1-00:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log

set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: sbatch --array=0-7 slurm/to_zarr.sh SOURCE STORE [options of to_zarr.py]" >&2
  exit 2
fi
# site: module load, source .venv/bin/activate
CONTAINER=() # site: for example (apptainer exec brainscale.sif), with scontrol inside, and PYTHON=python
PYTHON=${PYTHON:-.venv/bin/python}
if [ ${#CONTAINER[@]} = 0 ] && ! command -v "$PYTHON" >/dev/null; then
  echo "error: $PYTHON is not found in $PWD; submit from the checkout after 'make .venv/installed', or set PYTHON" >&2
  exit 2
fi
TASK=${SLURM_ARRAY_TASK_ID:-0}
if [ -z "${SHARDS:-}" ]; then # an array may begin at 1
  SHARDS=${SLURM_ARRAY_TASK_COUNT:-1}
  TASK=$((TASK - ${SLURM_ARRAY_TASK_MIN:-0}))
fi

# one process with workers of its own, so no srun: the signal is for that process alone, which then ends its workers
ASKED=no CODE=0 CONVERSION=
trap 'ASKED=yes; [ -z "$CONVERSION" ] || kill -TERM "$CONVERSION"' TERM
"${CONTAINER[@]}" "$PYTHON" data_prep/to_zarr.py "$@" --workers "${SLURM_CPUS_PER_TASK:-1}" --shard "$TASK/$SHARDS" &
CONVERSION=$!
wait "$CONVERSION" || CODE=$?
if [ "$ASKED" = yes ]; then # the signal broke off the wait
  wait "$CONVERSION" && CODE=0 || CODE=$?
fi
if [ "$ASKED" = yes ] && { [ "$CODE" = 75 ] || [ "$CODE" = 143 ]; }; then # 143: before it looked at signals
  "${CONTAINER[@]}" "$PYTHON" - <<'PYTHON' && exit
import sys
from brainscale import slurm_job
try:
    print(slurm_job.requeue())
except slurm_job.NotRequeued as why:
    sys.exit(f"not queued again: {why}")
PYTHON
  CODE=75
fi
exit "$CODE"
