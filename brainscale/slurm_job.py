"""The Slurm job that this process runs in, asked and told through Slurm's own commands: when it ends, once more please.

A job is queued again by whoever is first: Slurm (preemption, a dead node, an operator's `scontrol requeue`) or, after a
save, rank 0. Slurm counts a job's restarts at the moment it is queued again, so a count above this process's own, which
stands in its environment, means that it has been done already. Checked on Slurm 22.05.
"""

import os
import re
import subprocess
import time
from collections.abc import Callable

TIMEOUT_S = 60.0
"""How long one of Slurm's commands may take."""
ERRORS = (OSError, ValueError, subprocess.SubprocessError)
"""What asking Slurm may end in."""


class NotRequeued(RuntimeError):
    """The job is not queued again; the message says why."""


class NoAnswer(NotRequeued):
    """Since Slurm could not be asked: it may be, later on."""


def job_id() -> str | None:
    """Of the job (for an element of an array its own number); None outside of Slurm."""
    return os.environ.get("SLURM_JOB_ID")


def restarts() -> int:
    """How often the job had begun again when this process was started; 0 outside of Slurm."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def requeue() -> str:
    """Have the job queued again, unless that has happened; returns the sentence to say. To be called by one rank, when
    all have saved: Slurm ends what still runs within its KillWait.

    Raises NotRequeued where it cannot or should not be: outside of a batch job, when it was cancelled, when it was
    submitted with --no-requeue; NoAnswer when Slurm cannot be asked.
    """
    job = job_id()
    if job is None:
        raise NotRequeued("this is not a Slurm job")
    try:
        fields = describe(job)
        if int(fields["Restarts"]) > restarts():
            return f"Slurm has queued job {job} again"
        state = fields["JobState"]
        if fields["BatchFlag"] == "0":
            raise NotRequeued(f"job {job} was not submitted by sbatch")
        if state != "RUNNING":
            raise NotRequeued(f"job {job} was cancelled or is ending (state {state})")
        if fields["Requeue"] == "0":
            raise NotRequeued(f"job {job} was submitted with --no-requeue")
        _ask("scontrol", "requeue", job)
    except ERRORS as error:
        raise NoAnswer(f"Slurm could not be asked to ({_said(error)})") from error
    return f"job {job} is queued again"


def exclude(names: list[str]) -> bool:
    """Let this job, which waits to begin again, stay away from nodes, if there are enough others in its partition that
    are up; returns whether it does. Raises one of ERRORS."""
    job = job_id()
    assert job is not None
    fields = describe(job)
    known = fields.get("ExcNodeList", "(null)")
    away = sorted({*names, *([] if known == "(null)" else nodes(known))})
    up = _ask("sinfo", "--noheader", "--Node", "--responding", "--partition", fields["Partition"], "--format", "%N %t")
    usable = {name for name, state in map(str.split, up.splitlines()) if state in ("idle", "alloc", "mix", "comp")}
    if len(usable - set(away)) < int(fields["NumNodes"].partition("-")[0]):
        return False
    _ask("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(away)}")
    return True


def node() -> str:
    """Slurm's name of this node, or the host's. Several virtual nodes may share a host."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def nodes(compact: str) -> list[str]:
    """Names in a list such as n[1-3,7]. Raises one of ERRORS."""
    return _ask("scontrol", "show", "hostnames", compact).split()


def describe(job: str) -> dict[str, str]:
    """What Slurm knows of a job, by its own names (JobState, Restarts, …). Raises one of ERRORS."""
    text = _ask("scontrol", "show", "job", "--oneliner", job)
    return dict(field.split("=", 1) for field in text.split() if "=" in field)


def job_end_s(say: Callable[[str], None]) -> float | None:
    """`end_s`, or None, said aloud, when Slurm cannot be asked: only its warning signal stops the run in time."""
    try:
        return end_s()
    except ERRORS as error:
        say(f"the end of this Slurm job is not known ({_said(error)}); have it signalled: sbatch --signal=USR1@300")
        return None


def end_s() -> float | None:
    """When this job ends (seconds since 1970); None outside of a job and where it has no limit. Raises one of ERRORS.

    Slurm is asked, since an administrator may have moved the end since the job began; where there is no squeue, what
    the environment said then is taken.
    """
    job = job_id()
    if job is None:
        return None
    try:
        left = time_left_s(_ask("squeue", "--noheader", "--jobs", job, "--format", "%L").strip())
    except ERRORS:
        if "SLURM_JOB_END_TIME" not in os.environ:
            raise
        return float(os.environ["SLURM_JOB_END_TIME"])
    return None if left is None else time.time() + left


def time_left_s(text: str) -> float | None:
    """Seconds of Slurm's [days-][[hours:]minutes:]seconds; None for a job without limit."""
    if text in ("UNLIMITED", "NOT_SET"):
        return None
    found = re.fullmatch(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+)", text)
    if found is None:
        raise ValueError(f"squeue gave {text!r} as the time left")
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def _ask(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True).stdout


def _said(error: Exception) -> str:
    """What went wrong; for a command that failed, what it said."""
    told = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) and error.stderr else ""
    return told or str(error)
