"""Slurm jobs through submitit: the same command as in the sbatch scripts, one job for every combination of a sweep.

submitit writes the script, keeps it beside the logs, and starts one task per GPU. In a task it loads one pickled
object, `Command`, which becomes the command: from there on nothing differs from a task of `sbatch
slurm/pretrain_mae.sh`. Ranks and rendezvous are in distributed.py, preemption in stopping.py and cli.py. submitit's own
handler of signals is not used: it saves on rank 0 alone, and a save is collective.

The folder of a job (RUN/slurm) is for its owner alone, since whoever writes there could run code in the job.
"""

import itertools
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import submitit

from brainscale.config import Config
from brainscale.settings import InputError, load
from brainscale.stopping import SIGNALS

KEEP_SHELL = "trap : USR1 USR2 TERM  # the tasks save and leave; this shell waits for them"

THREADS = "export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1} SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}"
"""srun does not take the number of a task's cores over from sbatch (Slurm 22.05 and later)."""


@dataclass(frozen=True)
class Command:
    """Becomes `brainscale ARGUMENTS` when called."""

    arguments: list[str]

    def __call__(self) -> None:
        """Replaces this process. Signals wait, blocked, until the command looks at them."""
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        os.execv(sys.executable, [sys.executable, "-u", "-m", "brainscale", *self.arguments])


@dataclass(frozen=True)
class Resources:
    """What a job asks for; empty strings and zeros leave it to the cluster's defaults.

    sbatch: further options as key=value; setup: lines of shell before the tasks (modules, environments); python:
    shell words that start Python in a task, a container's included.
    """

    nodes: int = 1
    gpus_per_node: int = 0
    tasks_per_node: int = 1
    cpus_per_task: int = 8
    time_hours: float = 24.0
    signal_delay_s: int = 300
    partition: str = ""
    account: str = ""
    sbatch: Sequence[str] = ()
    setup: Sequence[str] = ()
    python: str = field(default_factory=lambda: shlex.quote(sys.executable))


@dataclass(frozen=True)
class Job:
    """A run of its own: the command's arguments, and where it lives."""

    name: str
    arguments: list[str]
    run_dir: Path


class Executor(submitit.SlurmExecutor):
    """Writes scripts on machines without Slurm too."""

    @classmethod
    def affinity(cls) -> int:
        """That Slurm may be used."""
        return 2


def sweep(config: Path, overrides: Sequence[str], options: Sequence[str] = ()) -> list[Job]:
    """Every combination of the values in `key=a,b`, as jobs whose settings are valid; one without any such key.

    A comma inside brackets or quotes does not split. With a sweep, run.dir is a folder of runs. options: of the
    command, added to each. Raises InputError.
    """
    keys = [override.partition("=")[0] for override in overrides]
    choices = [split(override.partition("=")[2]) for override in overrides]
    swept = [key for key, values in zip(keys, choices) if len(values) > 1]
    if "run.dir" in swept:
        raise InputError("run.dir is swept over; give one folder: each run of a sweep gets its own in it")
    jobs: list[Job] = []
    for values in itertools.product(*choices):
        chosen = [
            f"{key}={value}" if "=" in override else override for key, value, override in zip(keys, values, overrides)
        ]
        settings = load(Config, config, tuple(chosen))
        run_dir, name = Path(settings.run.dir or f"runs/{config.stem}"), config.stem
        if swept:
            name = ",".join(one for key, one in zip(keys, chosen) if key in swept).replace("/", "_")
            run_dir = run_dir / name
        others = [one for key, one in zip(keys, chosen) if key != "run.dir"]
        if any(run_dir == job.run_dir for job in jobs):
            raise InputError(f"two runs of the sweep would write {run_dir}; give each value once")
        jobs.append(Job(name, [str(config), *others, f"run.dir={run_dir}", *options], run_dir))
    return jobs


def split(text: str) -> list[str]:
    """Parts of a text at its commas, but for those inside brackets, braces or quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        if letter == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def script(job: Job, resources: Resources) -> str:
    """The sbatch script that `submit` would hand in, by two hooks that submitit has for its plug-ins."""
    executor = _executor(job, resources)
    return executor._make_submission_file_text(executor._submitit_command_str, "dry-run")


def submit(job: Job, resources: Resources) -> str:
    """Hand a job in; returns Slurm's number of it. Raises InputError when sbatch refuses it."""
    _private(job.run_dir / "slurm")
    try:
        return str(_executor(job, resources).submit(Command(["pretrain", *job.arguments])).job_id)
    except FileNotFoundError as error:
        raise InputError(f"{error.filename} is not found; submit where Slurm is, or run here with --local") from None
    except (subprocess.CalledProcessError, submitit.core.utils.FailedJobError) as error:
        raise InputError(f"sbatch refused the job: {' '.join(str(error).split())}") from None


def run_here(job: Job, resources: Resources) -> list[Path]:
    """Run a job on this machine, one process per task, and wait for it; returns the logs. Ctrl-C reaches the tasks,
    which save and leave."""
    _private(job.run_dir / "slurm")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // resources.tasks_per_node)))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by submitit's own process; the tasks set it anew
    executor = submitit.LocalExecutor(job.run_dir / "slurm", python=resources.python)
    executor.update_parameters(
        tasks_per_node=resources.tasks_per_node, gpus_per_node=resources.gpus_per_node,
        timeout_min=resources.time_hours * 60, signal_delay_s=resources.signal_delay_s, stderr_to_stdout=True,
    )  # fmt: skip
    started = executor.submit(Command(["pretrain", *job.arguments]))
    started.wait()
    return [started.task(number).paths.stdout for number in range(resources.tasks_per_node)]


def _executor(job: Job, resources: Resources) -> Executor:
    executor = Executor(job.run_dir / "slurm", python=resources.python)
    retry = f"{resources.python} -m brainscale retry $? {shlex.join(job.arguments)}"
    asked = {"partition": resources.partition, "account": resources.account, "gpus_per_node": resources.gpus_per_node}
    further = dict(_pair(option) for option in resources.sbatch)
    executor.update_parameters(
        job_name=job.name, nodes=resources.nodes, ntasks_per_node=resources.tasks_per_node,
        cpus_per_task=resources.cpus_per_task, time=max(1, round(resources.time_hours * 60)),
        signal_delay_s=resources.signal_delay_s, stderr_to_stdout=True, srun_args=["--kill-on-bad-exit=1"],
        setup=[KEEP_SHELL, THREADS, *resources.setup], teardown=[retry],
        additional_parameters={"requeue": True, **further},
        **{key: value for key, value in asked.items() if value},
    )  # fmt: skip
    return executor


def _pair(option: str) -> tuple[str, str | bool]:
    key, equals, value = option.removeprefix("--").partition("=")
    if "\n" in option or not key:
        raise InputError(f"--sbatch {option!r} is not of the form key=value, e.g. --sbatch constraint=h100")
    return key, value if equals else True


def _private(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
