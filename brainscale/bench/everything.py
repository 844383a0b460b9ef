"""`brainscale bench all`: every benchmark in turn, each in a process of its own, so that none leaves memory, threads or
a process group to the next; what was measured, and what needs a GPU or a peer that is not there."""

import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from brainscale.bench import record, schema
from brainscale.bench.schema import Line, Measured, Skipped, only


class Bench(NamedTuple):
    """Seconds that it takes on two cores that do nothing else, with --quick and without; what of it needs a GPU."""

    quick_s: float
    full_s: float
    needs_gpu: str


BENCHES = {
    "convert": Bench(15, 350, ""),
    "read": Bench(10, 95, ""),
    "loader": Bench(75, 450, "the share of a ViT-L/16 step in which a GPU waits for each of our loaders"),
    "kernels": Bench(20, 300, "seconds, GB/s and peak memory of gathers and losses (here their bytes are counted)"),
    "step": Bench(60, 600, "ratios to MONAI in bf16, MFU, the spectral term's share, every size and patch"),
    "scaling": Bench(60, 600, "weak and strong scaling over GPUs, and NCCL's pace (here gloo between processes)"),
    "checkpoint": Bench(50, 120, ""),
}
TAIL_LINES = 40


def run(quick: bool, json: Path | None) -> int:
    """Run all, append the lines to a file, print a summary. The number of benchmarks that failed; of such a one there
    is a line that says why."""
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        json.open("a").close()  # now, and not after the first benchmark
    begin, found, failed, took_s = time.monotonic(), list[Line](), dict[str, str](), dict[str, float]()
    expected_s = {name: one.quick_s if quick else one.full_s for name, one in BENCHES.items()}
    with TemporaryDirectory(prefix="brainscale-bench-") as folder:
        for number, name in enumerate(BENCHES, 1):
            rest_s, so_far_s = sum(list(expected_s.values())[number - 1 :]), time.monotonic() - begin
            say(
                f"\n[{number}/{len(BENCHES)}] {name}: about {span(expected_s[name])} where nothing else runs; "
                f"{span(so_far_s)} so far, about {span(rest_s)} to go"
            )
            file, start = Path(folder) / f"{name}.jsonl", time.monotonic()
            if reason := call(name, quick, file):
                failed[name] = reason
                record.write([record.skipped(name, "all of it", "brainscale", reason)], file)
            took_s[name] = time.monotonic() - start
            found += schema.read(file)
            if json is not None:
                with json.open("a", encoding="utf-8") as out:
                    out.write(file.read_text(encoding="utf-8"))
    say(summary(found, failed, took_s))
    return len(failed)


def say(text: str) -> None:
    """Print at once, in order with what the benchmarks print."""
    print(text, flush=True)


def call(name: str, quick: bool, file: Path) -> str:
    """Run one benchmark, printing what it prints; why it failed, "" when it did not."""
    command = [sys.executable, "-m", "brainscale", "bench", name, *(["--quick"] if quick else []), "--json", str(file)]
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace") as process:
        assert process.stderr is not None
        for line in process.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            tail.append(line.strip())
    if process.returncode == 0:
        return "" if file.exists() else "it wrote no lines"
    last = next((line for line in reversed(tail) if line.startswith("error: ")), "") or next(
        filter(None, reversed(tail)), ""
    )
    return f"failed with code {process.returncode}: {last.removeprefix('error: ')}"


def span(seconds: float) -> str:
    """A time in words."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def summary(lines: Sequence[Line], failed: dict[str, str], took_s: dict[str, float]) -> str:
    """What was measured, and what was not and why. took_s: seconds of each benchmark that was run. Pure."""
    measured = only(lines, Measured)
    text = ["", f"bench all took {span(sum(took_s.values()))}:"]
    for name, seconds in took_s.items():
        kinds = Counter(str(line.kind) for line in measured if line.bench == name)
        words = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "nothing was measured"
        text.append(f"  {name:<11}{span(seconds):>6}  {'FAILED, ' + failed[name] if name in failed else words}")
    if not any(line.machine.gpu for line in lines):
        text.append("there is no GPU; these need one, and were not measured:")
        text += [f"  {name:<11}{one.needs_gpu}" for name, one in BENCHES.items() if one.needs_gpu]
    skipped = [line for line in only(lines, Skipped) if line.bench not in failed]
    absent = {line.skipped for line in skipped if "not installed" in line.skipped}
    text += listed("peers that are not installed, and how to have them:", absent)
    other = {f"{line.bench}: {line.variant}: {line.skipped}" for line in skipped}
    text += listed("not measured here:", (one for one in other if "not installed" not in one and "GPU" not in one))
    return "\n".join(text)


def listed(title: str, items: Iterable[str]) -> list[str]:
    """A title over sorted items; nothing over none."""
    found = [f"  {item}" for item in sorted(items)]
    return [title, *found] if found else []
