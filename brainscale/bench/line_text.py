"""A line of a benchmark, for people."""

from typing import Any


def figures(line: dict[str, Any]) -> str:
    """All that a line says beside the name of its variant."""
    if line["skipped"]:
        return f"skipped: {line['skipped']}"
    seconds, median = line["unit"] == "s", line["median"]
    unit, factor = ("MB", 1e-6) if not seconds else ("s ", 1.0) if median >= 1 else ("ms", 1e3)
    if line["unit"] not in ("s", "B"):
        unit, factor = line["unit"], 1.0
    if seconds and median < 1e-3:
        unit, factor = "µs", 1e6
    columns = [f"{factor * median:8.2f} {unit}"]
    if line["n"] > 1:
        spread = f"[{factor * line['p20']:.2f}, {factor * line['p80']:.2f}]"
        columns[0] += f" {spread:<18}"
    if line["bench"] == "kernels":
        columns += _kernel_figures(line)
    elif line["bench"] == "loader":
        columns += _loader_figures(line)
    elif line["bench"] == "scaling":
        columns += _scaling_figures(line)
    elif line["bench"] == "step":
        columns += _step_figures(line)
    elif seconds:
        columns.append(f"{line['mb_per_s']:6.0f} MB/s" if line["mb_per_s"] else " " * 11)
        columns.append(f"{line['bytes_per_volume'] / 1e6:6.2f} MB" if line["bytes_per_volume"] else " " * 9)
    what = "× the speed of" if seconds else "× the bytes of"
    if line["variant"] != line["ratio_to"] and line.get("share") is None:
        columns.append(f"{line['ratio']:.2f}{what} {line['ratio_to']}")
    if line.get("ratio_to_persistent") is not None:
        columns.append(f"{line['ratio_to_persistent']:.2f}{what} PersistentDataset")
    return "  ".join(columns)


def _kernel_figures(line: dict[str, Any]) -> list[str]:
    """What a line of `bench kernels` says beside its median: against the least bytes, launches or speed, memory."""
    if line["unit"] == "B":
        times, held = line["median"] / line["minimum_bytes"], line["held_for_backward_bytes"]
        return [f"{times:6.2f}× the minimum", f"{line['launches']:3d} launches", f"{held / 1e6:7.2f} MB held"]
    columns = [f"{line['gb_per_s']:5.0f} GB/s, {100 * line['share_of_copy']:3.0f} % of a copy"]
    if line["peak_bytes"] is not None:
        columns.append(f"{line['peak_bytes'] / 1e6:7.1f} MB at peak")
    return columns


def _loader_figures(line: dict[str, Any]) -> list[str]:
    """What a line of `bench loader` says beside its median, as far as it says it."""
    figures = (
        ("volumes_per_s", 1, "6.1f", "volumes/s"), ("mb_per_s", 1, "5.0f", "MB/s"),
        ("cpu_s_per_volume", 1e3, "6.1f", "ms CPU"), ("bytes_per_volume", 1e-6, "6.2f", "MB on disk"),
        ("flops_per_sample", 1e-12, "5.2f", "TFLOP a sample"), ("starved_tflops", 1, "6.1f", "TFLOP/s fed"),
        ("gpu_share", 100, "6.1f", "% of a GPU"), ("idle_share", 100, "5.1f", "% waiting"),
        ("share", 100, "5.1f", "% of it"),
    )  # fmt: skip
    return [
        f"{factor * line[name]:{form}} {unit}"
        for name, factor, form, unit in figures
        if line[name] is not None and not (line["unit"] == "B" and name == "bytes_per_volume")
    ]


def _step_figures(line: dict[str, Any]) -> list[str]:
    """What a line of `bench step` says beside its median, as far as it says it."""
    figures = (
        ("samples_per_s", 1, "6.2f", "volumes/s"), ("tflops", 1, "7.3f", "TFLOP/s"), ("mfu", 100, "4.1f", "% MFU"),
        ("peak_bytes", 1e-9, "5.1f", "GB at peak"), ("spectral_share", 100, "4.1f", "% spectral"),
        ("launches", 1, "5d", "launches"),
    )  # fmt: skip
    columns = [f"{factor * line[name]:{form}} {unit}" for name, factor, form, unit in figures if line[name] is not None]
    if line["flop_rate_ratio"] is not None and abs(line["flop_rate_ratio"] / line["ratio"] - 1) > 0.05:
        columns.append(f"{line['flop_rate_ratio']:.2f}× its FLOP rate")
    return columns if line["kind"] != "compiled" else [line["form"]]


def _scaling_figures(line: dict[str, Any]) -> list[str]:
    """What a line of `bench scaling` says beside its median, as far as it says it; in brackets what was predicted."""
    figures = (
        ("mb_per_s", None, 1, "5.0f", "MB/s bus"), ("efficiency", "predicted_efficiency", 100, ".0f", "% efficient"),
        ("sent_bytes", "predicted_sent_bytes", 1e-6, ".1f", "MB sent"),
        ("collectives", "predicted_collectives", 1, ".0f", "collectives"),
        ("communication_share", None, 100, ".0f", "% communicating"),
        ("exposed_share", "predicted_exposed_share", 100, ".0f", "% waiting for it"),
    )  # fmt: skip
    columns = []
    for name, other, factor, form, unit in figures:
        if line[name] is not None:
            beside = line[other] if other else None
            said = "" if beside is None else f" ({factor * beside:{form}})"
            columns.append(f"{factor * line[name]:{form}}{said} {unit}")
    return columns
