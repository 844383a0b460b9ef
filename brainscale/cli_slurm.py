"""The commands of Slurm jobs: `submit`, and `retry`, which the jobs' scripts call."""

import shlex
import sys
from pathlib import Path

from brainscale.config import Config
from brainscale.settings import InputError, load

TIMES_ASKED, PAUSE_S = 20, 30.0
"""How patient `retry` is with a Slurm that does not answer, being restarted for example."""


def submit(
    config: Path,
    /,
    *overrides: str,
    nodes: int = 1,
    gpus_per_node: int = 0,
    tasks_per_node: int = 0,
    cpus_per_task: int = 8,
    time_hours: float = 24.0,
    signal_delay_s: int = 300,
    partition: str = "",
    account: str = "",
    sbatch: tuple[str, ...] = (),
    setup: tuple[str, ...] = (),
    python: str = "",
    allow_change: tuple[str, ...] = (),
    dry_run: bool = False,
    local: bool = False,
) -> None:
    """Submit a pretraining to Slurm through submitit, or a sweep: `key=a,b` makes a job of its own for each value.

    Jobs are queued again when they are preempted, run out of time or lose a node, and continue. Logs and the script lie
    in RUN/slurm.

    Example: brainscale submit configs/mae_vit_b.toml data.store=stores/brains --nodes 2 --gpus-per-node 8

    Example: brainscale submit configs/mae_vit_b.toml data.store=stores/brains optim.lr=1e-4,3e-4 seed=0,1 --dry-run

    Example: brainscale submit configs/mae_tiny_cpu.toml data.store=stores/brains --local --tasks-per-node 2

    Parameters
    ----------
    config
        Settings of the run (TOML).
    overrides
        Settings as key=value; commas outside of brackets and quotes make a sweep, whose runs lie below run.dir.
    gpus_per_node
        0: train on CPUs.
    tasks_per_node
        Processes on each node; by default one per GPU, or 1.
    time_hours
        Of one life of the job; it is queued again and continues until the run is done.
    signal_delay_s
        Seconds before the end at which Slurm warns the job.
    sbatch
        A further option of sbatch, as key=value; repeatable.
    setup
        A line of shell before the tasks start, such as "module load cuda"; repeatable.
    python
        Shell words that start Python in a task, such as "apptainer exec --nv brainscale.sif python"; by default the
        Python that runs this command.
    allow_change
        Passed on to the pretraining: a key that a resumed run may change; repeatable.
    dry_run
        Print the scripts, and submit nothing.
    local
        Run here and now, without Slurm, one after the other.
    """
    import json
    import time

    from brainscale_slurm.submit import Resources, run_here, script, sweep
    from brainscale_slurm.submit import submit as hand_in

    if dry_run and local:
        raise InputError("--dry-run prints the script of a Slurm job, --local runs without one; give one of them")
    if local and nodes > 1:
        raise InputError(
            f"--local is this machine alone, got --nodes {nodes}; leave it out, or use torchrun on each host"
        )
    resources = Resources(
        nodes, gpus_per_node, tasks_per_node or max(1, gpus_per_node), cpus_per_task, time_hours, signal_delay_s,
        partition, account, sbatch, setup, python or shlex.quote(sys.executable),
    )  # fmt: skip
    worst = 0
    for job in sweep(config, overrides, [f"--allow-change={key}" for key in allow_change]):
        if dry_run:
            print(f"# {job.run_dir}\n{script(job, resources)}")
        elif local:
            since_s, ended = time.time(), job.run_dir / "exit.json"
            logs = run_here(job, resources)
            new = ended.is_file() and ended.stat().st_mtime >= since_s
            record = json.loads(ended.read_text()) if new else {}
            code, sentence = int(record.get("code", 1)), record.get("sentence", "did not begin")
            print(f"{job.run_dir}: {sentence} (exit {code}); log: {logs[0]}")
            worst = max(worst, code)
        else:
            print(f"{hand_in(job, resources)}  {job.run_dir}  logs: {job.run_dir / 'slurm'}")
    sys.exit(worst)


def retry(
    code: int, config: Path, /, *overrides: str, allow_change: tuple[str, ...] = (), dry_run: bool = False
) -> None:
    """Have the Slurm job that this runs in queued again, if its tasks failed in a way that another start may mend.

    The last line of a job's script, see slurm/pretrain_mae.sh. A rank or node that was lost, and an error after
    something was saved, are tried again, health.max_restarts_without_progress times in a row without progress; a node
    on which ranks were lost twice is avoided where there are enough others. Ends with 0 when queued, else with CODE.

    Example: srun python -m brainscale pretrain CONFIG; python -m brainscale retry $? CONFIG

    Parameters
    ----------
    code
        What srun ended with.
    config
        The same as that of the pretraining.
    overrides
        The same as those of the pretraining.
    allow_change
        Taken, since the pretraining may have it, and without effect.
    dry_run
        The same.
    """
    import signal
    import time

    from brainscale import restarts, slurm_job

    if code == 0 or slurm_job.job_id() is None:
        sys.exit(code)
    try:
        settings = load(Config, config, overrides)
    except InputError as error:
        print(f"not queued again: {error}", file=sys.stderr)
        sys.exit(code)
    run_dir = Path(settings.run.dir or f"runs/{config.stem}")
    again, sentence, nodes = restarts.verdict(run_dir, code, settings.health.max_restarts_without_progress)
    if not again:
        if sentence:
            print(f"not queued again: {sentence}", file=sys.stderr)
        sys.exit(code)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm ends the script when the job is queued again
    told = ""
    for left in reversed(range(TIMES_ASKED)):
        try:
            told = slurm_job.requeue()
            break
        except slurm_job.NotRequeued as error:
            if left == 0 or not isinstance(error, slurm_job.NoAnswer):
                print(f"not queued again: {error}", file=sys.stderr)
                sys.exit(code)
            print(f"{error}; asked again in {PAUSE_S:.0f} s", file=sys.stderr, flush=True)
            time.sleep(PAUSE_S)
    print(f"{told}, since {sentence}", file=sys.stderr, flush=True)
    try:
        if nodes and slurm_job.exclude(nodes):
            print(f"it stays away from {', '.join(nodes)}, where ranks were lost twice", file=sys.stderr, flush=True)
    except slurm_job.ERRORS as error:
        print(f"it may come to {', '.join(nodes)} again, where ranks were lost twice ({error})", file=sys.stderr)
