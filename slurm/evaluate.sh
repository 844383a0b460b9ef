#!/bin/bash
# Score frozen encoders on Slurm: sbatch [options of sbatch] slurm/evaluate.sh RUN... --store STORE --tasks TASKS.toml [options]
#   sbatch --gpus-per-task=1 slurm/evaluate.sh runs/mae runs/jepa --store stores/adni --tasks configs/tasks/adni.toml --out runs/scores
# One process, on one GPU if there is one. What is finished is kept in OUT/parts, so a job that is preempted or nears its time
# limit is queued again and goes on; the same line continues one that was killed for good. The longest piece (one probe on all
# splits of a task, or its permutations) has to fit in --time: what began it over and over would never end.
# A site edits the lines below (options of the sbatch command go before these), and those marked "site".
##SBATCH --partition=gpu
##SBATCH --account=project
##SBATCH --gpus-per-task=1
#SBATCH --job-name=brainscale-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem-per-cpu=2G
#SBATCH --time=1-00:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@60
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail
if [ $# -lt 1 ]; then
  echo "usage: sbatch slurm/evaluate.sh RUN... --store STORE --tasks TASKS.toml [options of brainscale evaluate]" >&2
  exit 2
fi
# site: module load cuda, source .venv/bin/activate
CONTAINER=() # site: for example (apptainer exec --nv brainscale.sif), with scontrol inside, and PYTHON=python
PYTHON=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
if [ ${#CONTAINER[@]} = 0 ] && ! command -v "$PYTHON" >/dev/null; then
  echo "error: $PYTHON is not found in $PWD; submit from the checkout after 'make .venv/installed', or set PYTHON" >&2
  exit 2
fi

# one process, so no srun: the signal is for it alone
ASKED=no CODE=0 EVALUATION=
trap 'ASKED=yes; [ -z "$EVALUATION" ] || kill -TERM "$EVALUATION"' TERM
"${CONTAINER[@]}" "$PYTHON" -u -m brainscale evaluate "$@" &
EVALUATION=$!
wait "$EVALUATION" || CODE=$?
if [ "$ASKED" = yes ]; then # the signal broke off the wait
  wait "$EVALUATION" && CODE=0 || CODE=$?
fi
if [ "$ASKED" = yes ] && [ "$CODE" = 143 ]; then
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
