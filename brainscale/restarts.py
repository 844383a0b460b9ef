"""How often a Slurm job has begun anew without getting on, and whether to begin it once more after a failure.

RUN/starts.jsonl has a line for every start within a Slurm job: job, restart, step of the newest checkpoint, and how the
life before it ended. Preempted and timed-out lives queue themselves again (cli.py); a dead node is Slurm's business,
which queues the job again without it. What is left are failures, judged by the job's script when all its tasks are gone
(`verdict`, `brainscale retry`): a rank killed or lost, data that did not come, an error after a save are tried again;
settings, damage, collapse, an error before anything was saved are not, since they would come again.
"""

import json
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from brainscale import checkpoint_files, run_folder, slurm_job
from brainscale.distributed import World, broadcast
from brainscale.provenance import write_text

STARTS = "starts.jsonl"
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
            step, starts = newest_step(run_dir), read(run_dir)
            fruitless = fruitless_starts(starts, job, step)
            before = ended.get("sentence", "killed without a word") if starts and starts[-1]["job"] == job else ""
            _note(run_dir, starts, job, step, before, ended.get("lost_nodes", []))
            if fruitless > most:
                hopeless = _hopeless(job, fruitless, step, before)
    return broadcast(hopeless, world)


def verdict(run_dir: Path, code: int, most: int) -> Verdict:
    """What to do about a job whose tasks ended with `code`. most: as in `begin`.

    Writes exit.json where the run ended without it or is given up.
    """
    job, starts, record = slurm_job.job_id(), read(run_dir), _record(run_dir)
    step, told = newest_step(run_dir), record.get("sentence", "")
    cause = record.get("code", code)
    if job is None or not any(start["job"] == job for start in starts):
        return Verdict(False, "the run did not begin", [])
    if (starts[-1]["job"], starts[-1]["restart"]) != (
        job,
        slurm_job.restarts(),
    ):  # it has begun before, so this is no mistake in its settings
        starts = _note(run_dir, starts, job, step, told, record.get("lost_nodes", []))
        record, told = {}, f"it did not begin again (srun ended with {code})"
    if record and not record["again"] and not (cause == 1 and step > starts[-1]["step"]):
        return Verdict(False, "", [])
    told = told or f"its processes were killed (srun ended with {code})"
    fruitless = fruitless_starts(starts, job, step)
    if fruitless > most:
        told = _hopeless(job, fruitless, step, told)
        run_folder.write_record(run_dir, 5, told)
        return Verdict(False, told, [])
    if not record:
        run_folder.write_record(run_dir, code, told)
    lost = Counter(name for one in starts if one["job"] == job for name in one["lost_nodes"])
    lost.update(record.get("lost_nodes", []))
    return Verdict(True, told, sorted(name for name, count in lost.items() if count >= LOST_TWICE))


def fruitless_starts(starts: list[dict[str, Any]], job: str, step: int) -> int:
    """How many of the newest starts are of this job and at this step: what began there saved nothing new."""
    count = 0
    for start in reversed(starts):
        if (start["job"], start["step"]) != (job, step):
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


def _note(
    run_dir: Path, starts: list[dict[str, Any]], job: str, step: int, before: str, lost_nodes: list[str]
) -> list[dict[str, Any]]:
    """Write a line for this life; returns all lines."""
    start = {"job": job, "restart": slurm_job.restarts(), "step": step, "node": slurm_job.node()}
    lines = [*starts, {"utc": _now(), **start, "before": before, "lost_nodes": lost_nodes}]
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
