"""`brainscale bench markdown`: the README's table of what was measured, from kept lines alone.

ROWS says which lines go in, with words. × before a peer's name is how many times as fast ours was in the same run, of
bytes how many times as many, with the 20th and 80th percentile over rounds where the line holds them.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from brainscale.bench.schema import Line, LoaderLine, Measured, Reconstruction, only
from brainscale.settings import InputError

RESULTS = Path(__file__).with_name("results")
BEGIN, END = "<!-- made by `brainscale bench markdown` -->", "<!-- end -->"
PERSISTENT = "MONAI PersistentDataset"
"""The label under which `ratio_to_persistent` is shown."""


class Part(NamedTuple):
    """A line of ours. case: a pattern that its case holds."""

    label: str
    case: str
    variant: str = "brainscale"


class Row(NamedTuple):
    """A row: its lines, and the peers (variant → label) that they are compared with."""

    what: str
    bench: str
    parts: tuple[Part, ...]
    against: dict[str, str] = {}  # noqa: RUF012


RESAMPLED = {
    "nibabel + scipy zoom, order 3 + zarr-python": "nibabel + scipy zoom",
    "SimpleITK, cubic B-spline + zarr-python": "SimpleITK B-spline",
    "SimpleITK, linear + zarr-python": "SimpleITK linear",
    "MONAI PersistentDataset, first pass, linear": "MONAI",
}
NATIVE = {"nifti-zarr, one level": "nifti-zarr", "nibabel + zarr-python": "nibabel + zarr-python"}
FLOAT = {"float32, blosc zstd level 8, byte shuffle": "float32 in zstd level 8"}
ZARR = {"zarr-python": "zarr-python"}
NIBABEL = {"nibabel + torch DataLoader": "nibabel + torch DataLoader", "": PERSISTENT}
SAVES = {
    "DeepSpeed (no fsync, no hash)": "DeepSpeed",
    "torch.save of a copy in memory (no fsync, no hash, no rename)": "torch.save",
}
TORCH, DALI, STORE = "brainscale, torch loader", "brainscale, DALI loader", "brainscale (tensorstore)"
FULL, REAL = r"batches of 2, 160×192×160 int16$", r"batches of 2, 80×96×80 int16$"
WHOLE = r"^whole volumes, "
READ = r"int16, lz4, chunk 16×16×160, {}, as it is, 1 core$"
SAMPLE = r", 160×192×160 int16, patch 16×16×16, bf16, 1 sample$"
PAPER = {"the paper's form": "the paper's form", "eager, rfftn": "tuned rfftn", "torch.compile, rfftn": "that compiled"}
GATHERS = {"eager, whole volume": "eager", "torch.compile, whole volume": "torch.compile"}
STEPS = {
    "MONAI MaskedAutoEncoderViT, eager": "MONAI eager",
    "MONAI MaskedAutoEncoderViT, torch.compile, perceptron": "MONAI compiled",
}
HEAD, BRAIN = "whole head T1w of ds000011", "skull-stripped T1w of ds002748_native"
"""Scans of one size each: 160×192×192 int16, 288×288×181 float32."""
SAVED = "23.4 million parameters, 281 MB"
STOPS = ("an announced stop", "a kill")


def only_one(case: str) -> tuple[Part, ...]:
    """Our line in a case."""
    return (Part("", case),)


def codecs(case: str) -> tuple[Part, ...]:
    """Ours in both codecs."""
    return tuple(Part(codec, case, f"brainscale, int16, {codec}") for codec in ("lz4", "zstd"))


def states(case: str, variant: str) -> tuple[Part, ...]:
    """A warm and a cold page cache."""
    return tuple(Part(state, case.format(state), variant) for state in ("warm", "cold"))


ROWS = (
    Row(
        "convert to 1 mm, a head of 160×192×192, one core",
        "convert", only_one(f"^resampled to 1 mm.*{HEAD}.*1 core$"), RESAMPLED,
    ),
    Row(
        "the same, a stripped brain of 288×288×181 float32",
        "convert", only_one(f"^resampled to 1 mm.*{BRAIN}.*1 core$"), RESAMPLED,
    ),
    Row("convert native voxels, the same head", "convert", only_one(f"^native.*{HEAD}.*1 core$"), NATIVE),
    Row("the same, the stripped brain", "convert", only_one(f"^native.*{BRAIN}.*1 core$"), NATIVE),
    Row("bytes of the brain at 1 mm", "convert", codecs(f"^resampled to 1 mm.*{BRAIN}.*bytes"), FLOAT),
    Row("bytes of the head at 1 mm", "convert", codecs(f"^resampled to 1 mm.*{HEAD}.*bytes"), FLOAT),
    Row("bytes of the head's own 16-bit integers", "convert", codecs(f"^native.*{HEAD}.*bytes"), FLOAT),
    Row(
        "read a volume of 160×192×160 int16, lz4, chunks of rows, one core",
        "read", states(f"^whole volume .*{READ}", STORE), ZARR,
    ),
    Row("read a 96³ crop of it", "read", states(f"^crop .*{READ}", STORE), ZARR),
    Row(
        "load batches of 2 such volumes, plain loader, 2 readers",
        "loader", states(f"{WHOLE}{{}}, 2 workers, {FULL}", TORCH), NIBABEL,
    ),
    Row("the same, 1 reader", "loader", states(f"{WHOLE}{{}}, 1 worker, {FULL}", TORCH), NIBABEL),
    Row(
        "the same through DALI on the CPU (it is for GPUs), 2 readers",
        "loader", states(f"{WHOLE}{{}}, 2 workers, {FULL}", DALI), NIBABEL,
    ),
    Row(
        "real scans of 80×96×80, plain loader, 2 readers",
        "loader", states(f"{WHOLE}{{}}, 2 workers, {REAL}", TORCH), NIBABEL,
    ),
    Row(
        "stall of the loop by a save of 281 MB (23 million parameters, moments)",
        "checkpoint", only_one(f"^stall.*{SAVED}"), SAVES,
    ),
    Row("of which the loop is held", "checkpoint", only_one(f"^loop held.*{SAVED}"), SAVES),
    Row(
        "the save until it is on disk and hashed (the others do neither)",
        "checkpoint",
        (
            Part("behind the steps", f"^save until.*{SAVED}"),
            Part("without steps", f"^save until.*{SAVED}", "brainscale, background = false"),
        ),
        SAVES,
    ),
    Row("load it, hashes compared, files in the page cache", "checkpoint", only_one(f"^load.*{SAVED}"), SAVES),
    Row("start a process until its first step is logged, resumed", "checkpoint", only_one("^start of a process")),
    Row(
        "share of a week that is training, a save every 22 min",
        "checkpoint",
        tuple(Part(f"{stop} a day", "^simulated", f"{stop} a day, saved every 22 min") for stop in STOPS),
    ),
    Row(
        "memory traffic of a gather of visible patches: 160×192×160 int16, patch 16, 75 % masked, bf16",
        "kernels", only_one(f"^gather{SAMPLE}"), GATHERS,
    ),
    Row(
        "of the spectral loss of the volume, forward and backward",
        "kernels", only_one(f"^spectral loss, volume.*{SAMPLE}"), PAPER,
    ),
    Row("of the spectral loss of patches", "kernels", only_one(f"^spectral loss, patch.*{SAMPLE}"), PAPER),
    Row(
        "training step of ViT-S/16 at 96³, fp32, batch 4, at the same FLOPs (a CPU: no kernel of ours runs)",
        "step", tuple(Part(name, "^ViT-S/16, 96×96×96 int16, fp32", name) for name in ("MAE", "MAE + spectral")), STEPS,
    ),
    Row(
        "memory traffic of each volume of a ViT-B/16 MAE step, 160×192×160, bf16, no kernels, not compiled",
        "step", (Part("", "^counted.*ViT-B/16, 160×192×160.*each volume", "MAE, plain PyTorch"),), STEPS,
    ),
    Row(
        "step on 2 ranks by gloo, one core each, ZeRO 1, 14 million parameters, fp32, 4 volumes of 80×96×80 a rank",
        "scaling", (Part("", "^weak scaling, ZeRO 1: mae, 14", "2 ranks"),),
        {"1 rank": "one rank with half the volumes"},
    ),
    Row(
        "step of a MAE with the spectral term, 80×96×80, 1,200 tokens, batch 4, fp32, 2 threads",
        "reconstruction", only_one(r"^configs/mae_tiny_cpu\.toml"),
    ),
)  # fmt: skip


def kept() -> list[Path]:
    """The files that the README's table is made from. Raises InputError where the package came without them."""
    files = sorted(RESULTS.glob("*.jsonl"))
    if not files:
        raise InputError(f"{RESULTS} has no kept lines; give files that `brainscale bench NAME --json FILE` wrote")
    return files


def markdown(lines: Sequence[Line]) -> str:
    """The table; a row without a line is left out. Raises InputError when there is none."""
    rows = [cells for row in ROWS if (cells := row_of(row, lines))]
    if not rows:
        raise InputError("none of the lines has a row in the table; give files of `brainscale bench` without --quick")
    text = ["| what | command | figure | how | hardware | commit, date |", "|---|---|---|---|---|---|"]
    text += [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join(text) + "\n"


def row_of(row: Row, lines: Sequence[Line]) -> list[str]:
    """The cells of a row; none where no line is kept for it."""
    if row.bench == "reconstruction":
        return trained(row, lines)
    measured = [line for line in only(lines, Measured) if line.bench == row.bench]
    figures, used = [], list[Measured]()
    for part in row.parts:
        case = [line for line in measured if re.search(part.case, line.case)]
        if own := [line for line in case if line.variant == part.variant]:
            newest = max(own, key=lambda line: line.utc)
            beside = [line for line in case if (line.case, line.utc[:10]) == (newest.case, newest.utc[:10])]
            figures.append(f"{part.label} {value(newest)}{compared(newest, beside, row.against)}".strip())
            used.append(newest)
    if not used:
        return []
    how = ", ".join(dict.fromkeys(kind_of(line) for line in used))
    return [row.what, f"`brainscale bench {row.bench}`", "; ".join(figures), how, *origin(used)]


def trained(row: Row, lines: Sequence[Line]) -> list[str]:
    """The cells of a row over a training run."""
    for line in only(lines, Reconstruction):
        if re.search(row.parts[0].case, line.case):
            figure = f"{line.median_step_s:.2f} s, {line.voxels_per_s / 1e6:.1f} million voxels/s"
            return [row.what, f"`brainscale pretrain {line.case.split(',')[0]}`", figure, "timed", *origin([line])]
    return []


def origin(lines: Sequence[Measured] | Sequence[Reconstruction]) -> list[str]:
    """Hardware, commit and date, which older lines may not all share."""
    hardware = (f"{line.machine.cores or 2} cores of {short(line.machine.cpu)}" for line in lines)
    gpus = (f"{line.machine.gpu}, driver {line.machine.driver}" for line in lines if line.machine.gpu)
    commits = (f"{line.commit[:7]}, {line.utc[:10]}" for line in lines)
    return ["; ".join(dict.fromkeys((*gpus, *hardware))), "; ".join(dict.fromkeys(commits))]


def short(cpu: str) -> str:
    """A processor's name without its marks."""
    return re.sub(r"\((R|TM)\)| Processor$", "", cpu)


def kind_of(line: Measured) -> str:
    """How a figure came about; older lines do not say."""
    if line.kind is None and line.case.startswith("simulated"):
        return "simulated"
    return line.kind or ("timed" if line.unit == "s" else "counted")


def value(line: Measured) -> str:
    """The figure itself."""
    if isinstance(line, LoaderLine) and line.volumes_per_s:
        return f"{line.volumes_per_s:.0f} volumes/s"
    if kind_of(line) == "simulated":
        return f"{100 * line.ratio:.2f} %"
    if line.unit == "s":
        return f"{line.median:.2f} s" if line.median >= 0.1 else f"{1e3 * line.median:.1f} ms"
    return f"{line.median / 1e9:.3g} GB" if line.median >= 1e9 else f"{line.median / 1e6:.3g} MB"


def compared(line: Measured, beside: Sequence[Measured], against: dict[str, str]) -> str:
    """Ours to each peer that was measured in the same run."""
    found = []
    by_name = {one.variant: one for one in beside}
    for name, label in against.items():
        if label == PERSISTENT:
            if isinstance(line, LoaderLine) and line.ratio_to_persistent:
                found.append(f"{times(line.ratio_to_persistent)} {label}")
        elif name == line.ratio_to:
            found.append(f"{times(line.ratio, line.ratio_p20, line.ratio_p80)} {label}")
        elif (peer := by_name.get(name)) and peer.ratio_to == line.variant:
            spread = [1 / end for end in (peer.ratio_p80, peer.ratio_p20) if end]
            found.append(f"{times(1 / peer.ratio, *spread)} {label}")
        elif peer and peer.ratio_to == line.ratio_to:
            found.append(f"{times(line.ratio / peer.ratio)} {label}")
    return f" ({', '.join(found)})" if found else ""


def times(ratio: float, low: float | None = None, high: float | None = None) -> str:
    """A ratio to two digits, with its spread where there is one."""
    spread = f" [{digits(low)}, {digits(high)}]" if low and high else ""
    return f"{digits(ratio)}×{spread}"


def digits(number: float) -> str:
    """Two significant digits, and whole numbers whole."""
    return f"{number:.0f}" if number >= 10 else f"{number:.1f}" if number >= 1 else f"{number:.2g}"
