"""What a run waits for, and the setting to change: the sentences of `brainscale doctor RUN` and of the run's page.

How long a run waited for data, checkpoints and evaluations stands in every logged line of metrics.jsonl; what the rest
of its steps consists of comes from the latest step that was sampled (`step_profile.py`). Only the newest process
counts, without its first line, which holds compilation and cold caches. Needs neither torch nor the store.
"""

from itertools import pairwise
from typing import Any, NamedTuple

from brainscale.config import Config
from brainscale.figures import Metrics
from brainscale.report_health import warned

RECENT_STEPS = 500
"""How far back a diagnosis looks, at least two lines."""
WORTH = 0.05
"""Share of the time from which something is worth a sentence."""
BOUND = 0.9
"""Share of compute from which nothing else is worth much."""
NAMES = {
    "data": "data",
    "host_to_device": "copies to the GPU",
    "compute": "compute",
    "communication": "communication",
    "host": "launching",
    "checkpoint": "checkpoints",
    "other": "evaluation and probes",
}
INSIDE = ("host_to_device", "compute", "communication", "host")
"""What only a sample tells apart."""
MEASURED = ("time_s", "step_s", "data_s", "checkpoint_s")
"""What a logged line holds in every version."""


class Interval(NamedTuple):
    """What lies between two logged lines. step_s and data_s: of one step; own_wait, largest_wait: shares of a step that
    rank 0, and the rank which waits longest, wait for data."""

    steps: int
    step_s: float
    data_s: float
    checkpoint_s: float
    other_s: float
    own_wait: float
    largest_wait: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.steps * self.step_s + self.checkpoint_s + self.other_s


class Diagnosis(NamedTuple):
    """shares: of the time, by the keys of NAMES, sum 1, None where it is not known; {} when there is nothing to go by.
    seen: what they were taken from."""

    verdict: str
    seen: str
    shares: dict[str, float | None]
    advice: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def rows(self) -> list[tuple[str, float | None]]:
        """(what, share), for people."""
        return [(NAMES[name], share) for name, share in self.shares.items()]


def diagnose(metrics: Metrics, config: Config, about: dict[str, Any], ending: dict[str, Any]) -> Diagnosis:
    """From a run's metrics by step, its settings, run.json and exit.json (each {} if absent)."""
    start, last = newest_process(metrics)
    parts = recent(intervals({step: line for step, line in metrics.items() if step > start}))
    if len(parts) < 2:
        needed = f"run at least {3 * config.log.every_steps} steps"
        verdict = f"fewer than 2 logged intervals besides the first of this process: nothing to say yet; {needed}"
        return Diagnosis(verdict, "", {}, (), notes(metrics, config, ending, last, None))
    sampled = max((step for step, line in metrics.items() if step > start and "profile" in line), default=None)
    shares = time_shares(parts, metrics[sampled]["profile"] if sampled is not None else {})
    steps = sum(part.steps for part in parts)
    seen = f"steps {last - steps + 1:,} to {last:,}; " + (
        f"what a step consists of was sampled at step {sampled:,}" if sampled is not None else
        "what a step consists of is not known: none was sampled since the last start (log.profile_every_steps is "
        f"{config.log.profile_every_steps})"
    )  # fmt: skip
    worth = sorted((name for name in ADVICE if (shares[name] or 0) >= WORTH), key=lambda name: -(shares[name] or 0))
    advice = [f"{NAMES[name]}, {shares[name]:.0%} of the time: {ADVICE[name](config, about)}" for name in worth]
    hours = sum(part.seconds for part in parts) / steps / 3600
    verdict = verdict_of(shares, bool(starving(parts)))
    return Diagnosis(verdict, seen, shares, (*starving(parts), *advice), notes(metrics, config, ending, last, hours))


def text(name: str, found: Diagnosis) -> str:
    """A diagnosis for a terminal: the verdict, a table with bars, what to change, what else there is."""
    table = [
        f"  {what:22}" + ("not known" if share is None else f"{share:7.1%}  {'█' * round(40 * share)}".rstrip())
        for what, share in found.rows
    ]
    blocks = ([f"{name}: {found.verdict}", *filter(None, [found.seen])], table, found.advice, found.notes)
    return "\n\n".join("\n".join(block) for block in blocks if block)


# ------------------------------------------------------------------------------------------------- times


def newest_process(metrics: Metrics) -> tuple[int, int]:
    """(step that the newest process started from, newest logged step); the first is -1 where no line says it."""
    last = max((step for step, line in metrics.items() if "step_s" in line), default=0)
    done = metrics.get(last, {}).get("process_steps")
    return (-1 if done is None else last - done), last


def intervals(metrics: Metrics) -> list[Interval]:
    """Between the logged lines of one process, in order."""
    logged = [(step, line) for step, line in metrics.items() if all(line.get(key) is not None for key in MEASURED)]
    found = []
    for (before, earlier), (step, line) in pairwise(logged):
        steps, own = step - before, line["data_s"] / line["step_s"]
        apart = line["time_s"] - earlier["time_s"] - steps * line["step_s"] - line["checkpoint_s"]
        other, largest = line.get("other_s", max(0.0, apart)), line.get("data_wait_max_fraction", own)
        found.append(Interval(steps, line["step_s"], line["data_s"], line["checkpoint_s"], other, own, largest))
    return found


def recent(parts: list[Interval]) -> list[Interval]:
    """The last ones, of RECENT_STEPS steps together, and at least two."""
    kept: list[Interval] = []
    for part in reversed(parts):
        if len(kept) >= 2 and sum(each.steps for each in kept) >= RECENT_STEPS:
            break
        kept.insert(0, part)
    return kept


def time_shares(parts: list[Interval], profile: dict[str, float]) -> dict[str, float | None]:
    """Shares of all time by the keys of NAMES. profile: shares of a sampled step, {} if there is none."""
    total = sum(part.seconds for part in parts)
    data = sum(part.steps * part.data_s for part in parts) / total
    checkpoint, other = (sum(getattr(part, name) for part in parts) / total for name in ("checkpoint_s", "other_s"))
    rest, known = max(0.0, 1 - data - checkpoint - other), sum(profile.get(name, 0.0) for name in INSIDE)
    inside = {name: rest * profile[name] / known if known else None for name in INSIDE}
    found: dict[str, float | None] = {"data": data, **inside, "checkpoint": checkpoint, "other": other}
    return {name: found[name] for name in NAMES}


# ------------------------------------------------------------------------------------------------- words


def verdict_of(shares: dict[str, float | None], another_starves: bool) -> str:
    """What the run waits for most. another_starves: whether another rank than the first waits for data."""
    compute = shares["compute"]
    waits = {name: share for name, share in shares.items() if name != "compute" and share is not None}
    most = max(waits, key=lambda name: waits[name])
    if compute is not None and compute >= BOUND:
        return f"compute-bound, {compute:.0%} of the time: nothing to gain from the loader"
    if waits[most] >= WORTH:
        why = ", in which another rank waits for data" if another_starves and most == "communication" else ""
        return f"waits for {NAMES[most]} most, {waits[most]:.0%} of the time{why}"
    if compute is None:
        return f"data, checkpoints, evaluation and probes take less than {WORTH:.0%} each; the rest is not known"
    return f"computes {compute:.0%} of the time; nothing else takes {WORTH:.0%}"


def starving(parts: list[Interval]) -> list[str]:
    """Whether another rank than the first, which all numbers but this are of, waits for data."""
    steps = sum(part.steps for part in parts)
    own, largest = (sum(part.steps * getattr(part, name) for part in parts) / steps for name in Interval._fields[-2:])
    if largest - own < WORTH:
        return []
    return [
        f"another rank waits for data {largest:.0%} of its steps, rank 0 {own:.0%}, and the ranks wait for each other, "
        "which is communication: look at the cores and the disk of that rank's machine, and raise data.workers"
    ]


def of_data(config: Config, about: dict[str, Any]) -> str:
    """What to do about waiting for data."""
    machine, workers, plan = about.get("machine", {}), config.data.workers, about.get("store", {}).get("plan", {})
    cores, ranks = machine.get("cores"), machine.get("ranks", 1)
    if cores is None:
        todo = [f"raise data.workers (now {workers}), up to the cores that each rank has"]
    elif workers < cores // ranks:
        todo = [f"raise data.workers from {workers} to {cores // ranks} ({cores} cores for {ranks} rank(s) here)"]
    else:
        todo = [f"data.workers = {workers} uses all cores already ({cores} for {ranks} rank(s) here)"]
    if on_gpu(about) and about.get("loader", config.data.loader) != "dali":
        todo.append('set data.loader = "dali"')
    if plan.get("codec", "lz4") != "lz4":
        todo.append(f"convert with codec=lz4 (now {plan['codec']}), which is read twice as fast")
    return "; ".join([*todo, "keep the store on a local disk", "`brainscale bench loader` shows which stage is slow"])


def of_copies(config: Config, about: dict[str, Any]) -> str:
    """What to do about copies to the GPU."""
    dtype, todo = about.get("store", {}).get("plan", {}).get("dtype"), []
    if dtype not in (None, "uint8"):
        todo.append(f"convert with a smaller dtype (now {dtype})")
    todo.append("look at the GPU's PCIe link (nvidia-smi -q -d PCIE); a larger micro-batch does not help")
    return "; ".join(todo)


def of_communication(config: Config, about: dict[str, Any]) -> str:
    """What to do about communication."""
    stage, micro, todo = config.zero.stage, config.train.micro_batch_volumes, []
    if about.get("world_size", 1) == 1:
        return (
            "one rank sends nothing to others: these are DeepSpeed's collectives with itself, which weigh less in "
            f"longer steps (train.micro_batch_volumes, now {micro})"
        )
    if stage > 1:
        todo.append(f"lower zero.stage (now {stage}) if memory allows, since stages 2 and 3 send more")
    if config.train.global_batch_volumes > micro * about.get("world_size", 1):
        todo.append(f"raise train.micro_batch_volumes (now {micro}): fewer accumulated passes, fewer exchanges")
    tells = " (NCCL_DEBUG=INFO says which are used)" if on_gpu(about) else ""
    todo.append(f"look at the links between ranks and machines{tells}")
    todo.append("more volumes per step (train.global_batch_volumes) send the same bytes less often, but change results")
    return "; ".join(todo)


def of_host(config: Config, about: dict[str, Any]) -> str:
    """What to do about a GPU that idles while Python is behind."""
    todo = []
    if config.train.compile is False and config.zero.stage < 3:
        todo.append("set train.compile = true")
    if config.zero.offload_optimizer:
        todo.append("set zero.offload_optimizer = false if memory allows")
    todo.append(f"raise train.micro_batch_volumes (now {config.train.micro_batch_volumes}): more work per launch")
    todo.append(f"log less often (log.every_steps is {config.log.every_steps}) and to fewer log.trackers")
    todo.append('train.profile = "steps A-B" shows the phase in which it idles')
    return "the GPU idles while Python is behind: " + "; ".join(todo)


def of_checkpoints(config: Config, about: dict[str, Any]) -> str:
    """What to do about time for checkpoints."""
    todo = [f"raise checkpoint.every_steps (now {config.checkpoint.every_steps})"]
    if not config.checkpoint.background:
        todo.append("set checkpoint.background = true")
    return "; ".join([*todo, "write to a faster disk, since a save also waits for the one before"])


def of_other(config: Config, about: dict[str, Any]) -> str:
    """What to do about time for evaluation, probes and samples."""
    log, health = config.log, config.health
    return (
        f"raise log.holdout_every_steps (now {log.holdout_every_steps}), health.probe_every_steps "
        f"(now {health.probe_every_steps}) or log.profile_every_steps (now {log.profile_every_steps}; 0: never for the "
        f"last two), or lower log.holdout_volumes (now {log.holdout_volumes})"
    )


ADVICE = {
    "data": of_data, "host_to_device": of_copies, "communication": of_communication, "host": of_host,
    "checkpoint": of_checkpoints, "other": of_other,
}  # fmt: skip


def on_gpu(about: dict[str, Any]) -> bool:
    """Whether run.json names a GPU."""
    return not about.get("machine", {}).get("device", "cpu").startswith("cpu")


def notes(
    metrics: Metrics, config: Config, ending: dict[str, Any], last: int, step_hours: float | None
) -> tuple[str, ...]:
    """How far the run is, how it ended, steps left out, warnings."""
    goal = config.train.num_steps
    left = "" if step_hours is None or last >= goal else f"; {(goal - last) * step_hours:.1f} hours left at this rate"
    said = [f"step {last:,} of {goal:,}{left}"]
    if ending:
        said.append(f"the last process ended with exit code {ending['code']}: {ending['sentence']}")
    else:
        said.append("no end recorded: still running, or killed")
    if skipped := metrics.get(last, {}).get("skipped_steps"):
        said.append(f"{skipped} step(s) were left out because they were not finite; nonfinite/ names the scans")
    said += [
        f"warning {each.code}, {each.times} time(s), last at step {each.last:,}: {each.sentence}"
        for each in warned(metrics)
    ]
    return tuple(said)
