"""How every benchmark measures and what a line says.

Variants run in turn, A B C A B C …, so that a drift of the machine's speed meets all of them; a line holds median and
20th and 80th percentile, and the ratio is the median of the ratios taken pair by pair.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from brainscale import provenance


def measure(
    bench: str, case: str, variants: dict[str, Callable[[], Any]], reference: str, n: int = 15, warmup: int = 2
) -> list[dict[str, Any]]:
    """Time each variant `n` times in turn, in seconds; a ratio above 1 means faster than `reference`. A line each."""
    for _ in range(warmup):
        for run in variants.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(n):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    lines = []
    for name, times in seconds.items():
        ratios = [base / own for base, own in zip(seconds[reference], times)]
        p20, p80 = np.percentile(times, (20, 80))
        lines.append(
            {
                "bench": bench, "case": case, "variant": name, "unit": "s", "median": statistics.median(times),
                "p20": float(p20), "p80": float(p80), "n": n, "ratio_to": reference,
                "ratio": statistics.median(ratios), "skipped": None, **surroundings(),
            }
        )  # fmt: skip
    return lines


def skipped(bench: str, case: str, variant: str, reason: str) -> dict[str, Any]:
    """The line of a variant that could not run."""
    return {"bench": bench, "case": case, "variant": variant, "skipped": reason, **surroundings()}


def surroundings() -> dict[str, Any]:
    """Machine, versions, commit and time of a measurement."""
    return {
        "machine": {"cpu": provenance.cpu_name(), "cores": os.cpu_count(), "gpu": None, "driver": None},
        "versions": provenance.versions(),
        "commit": provenance.commit(),
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write(lines: list[dict[str, Any]], path: Path | None) -> None:
    """Print a table, and append the lines to a JSON-lines file."""
    for line in lines:
        if line["skipped"]:
            print(f"{line['case']:<40} {line['variant']:<28} skipped: {line['skipped']}")
        else:
            print(
                f"{line['case']:<40} {line['variant']:<28} {1e3 * line['median']:8.2f} ms "
                f"[{1e3 * line['p20']:.2f}, {1e3 * line['p80']:.2f}]  {line['ratio']:.2f}× {line['ratio_to']}"
            )
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
