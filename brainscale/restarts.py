"""How often a Slurm job has begun anew without getting on, and whether to begin it once more after a failure.

RUN/starts.jsonl has a line for every start within a Slurm job: job, restart, step of the newest checkpoint, and how the
life before it ended. Preempted and timed-out lives queue themselves again (cli.py); a dead node is Slurm's business,
which queues the job again without it. What is left are failures, judged by the job's script when all its tasks are gone
(`verdict`, `brainscale retry`): a rank killed or lost, data that did not come, an error after a save are tried again;
settings, damage, collapse, an error before anything was saved are not, since they would come again.
"""

import json
import signal
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import filelock

from brainscale import checkpoint_files, run_folder, slurm_job
from brainscale.distributed import World, broadcast
from brainscale.provenance import write_text

STARTS = "starts.jsonl"
EARLY_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
"""What ends a task that does not look at signals yet."""
LOST_TWICE = 2
"""Times that ranks were lost on a node until a job stays away from it: the first may have been chance."""


class Verdict(NamedTuple):
    """Whether a failed job should begin again, why (if that is news), and without which nodes."""

    again: bool
    sentence: str
    nodes: list[str]


def begin(run_dir: Path, most: int, world: World) -> str:
    """Collective: note this start; returns why it should not go on, or "". Nothing outside of a Slurm job.

    most: restarts of one job that may save nothing new, in a row. Removes exit.json.
    """
    hopeless = ""
    if world.is_first:
        ended = _record(run_dir)
        (run_dir / "exit.json").unlink(missing_ok=True)
        if job := slurm_job.job_id():
            step, mine = newest_step(run_dir), _of(job, read(run_dir))
            fruitless = fruitless_starts(mine, step)
            before = ended.get("sentence", "killed without a word") if mine else ""
            _note(run_dir, job, step, before, ended.get("lost_nodes", []) if mine else [])
            if fruitless > most:
                hopeless = _hopeless(job, fruitless, step, before)
    return broadcast(hopeless, world)


def verdict(run_dir: Path, code: int, most: int) -> Verdict:
    """What to do about a job whose tasks ended with `code`. most: as in `begin`.

    Writes exit.json where the run ended without it or is given up; nothing while another process holds the run folder.
    """
    job = slurm_job.job_id()
    mine = _of(job, read(run_dir))
    if job is None or not mine:
        early = code - 128 in EARLY_SIGNALS and slurm_job.restarts() <= most
        return Verdict(early, "a signal came before the run began" if early else "the run did not begin", [])
    if _held(run_dir):
        return Verdict(False, f"another process holds {run_dir}", [])
    step, record = newest_step(run_dir), _record(run_dir)
    told = record.get("sentence", f"its processes were killed (srun ended with {code})")
    if mine[-1]["restart"] != slurm_job.restarts():  # it has begun before, so this is no mistake in its settings
        mine = _of(job, _note(run_dir, job, step, told, record.get("lost_nodes", [])))
        record, told = {}, f"it did not begin again (srun ended with {code})"
    after_a_save = record.get("code") == 1 and step > mine[-1]["step"]
    if record and not record.get("again") and not after_a_save:
        return Verdict(False, "" if record["code"] in (0, 75) else "another start would end alike", [])
    fruitless = fruitless_starts(mine, step)
    if fruitless > most:
        told = _hopeless(job, fruitless, step, told)
        run_folder.write_record(run_dir, 5, told)
        return Verdict(False, told, [])
    if not record:
        run_folder.write_record(run_dir, code, told)
    lost = Counter(name for start in (*mine, record) for name in start.get("lost_nodes", []))
    return Verdict(True, told, sorted(name for name, count in lost.items() if count >= LOST_TWICE))


def fruitless_starts(mine: list[dict[str, Any]], step: int) -> int:
    """How many of a job's newest starts are at this step: what began there saved nothing new."""
    count = 0
    for start in reversed(mine):
        if start["step"] != step:
            break
        count += 1
    return count


def read(run_dir: Path) -> list[dict[str, Any]]:
    """Lines of starts.jsonl, oldest first."""
    path = run_dir / STARTS
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def newest_step(run_dir: Path) -> int:
    """Of the newest checkpoint; 0 where there is none."""
    found = checkpoint_files.directories(run_dir / "checkpoints")
    return checkpoint_files.step_of(found[-1]) if found else 0


def _of(job: str | None, starts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [start for start in starts if start["job"] == job]


def _held(run_dir: Path) -> bool:
    """Whether a process trains in a run folder."""
    try:
        with filelock.FileLock(run_dir / ".lock", timeout=0):
            return False
    except filelock.Timeout:
        return True


def _note(run_dir: Path, job: str, step: int, before: str, lost_nodes: list[str]) -> list[dict[str, Any]]:
    """Write a line for this life; returns all lines."""
    start = {"job": job, "restart": slurm_job.restarts(), "step": step, "node": slurm_job.node()}
    lines = [*read(run_dir), {"utc": _now(), **start, "before": before, "lost_nodes": lost_nodes}]
    write_text(run_dir / STARTS, "".join(json.dumps(line) + "\n" for line in lines))
    return lines


def _record(run_dir: Path) -> dict[str, Any]:
    """exit.json; {} where there is none."""
    path = run_dir / "exit.json"
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return record


def _hopeless(job: str, fruitless: int, step: int, told: str) -> str:
    return (
        f"Slurm job {job} began {fruitless} times in a row at step {step} and saved nothing further, so it is given up "
        f"(health.max_restarts_without_progress); the last time: {told}"
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
