"""The commands of `brainscale bench` that measure or foretell whole steps."""

import sys
from pathlib import Path

from brainscale.settings import InputError


def step(
    *overrides: str,
    sizes: str = "",
    patches: str = "",
    objectives: str = "",
    batch: int = 0,
    quick: bool = False,
    json: Path | None = None,
) -> None:
    """Time training steps of the presets against MONAI's MaskedAutoEncoderViT at the same FLOPs (eager and compiled),
    against plain PyTorch without our kernels, and with and without compilation: MAE, with the spectral term, JEPA, with
    VCR.

    On a GPU in bf16: ViT-B/16 and L/16 in every form, S/16, H/16, B/12 and B/8 as configured. Without one: ViT-S/16 at
    96³ in fp32, and bytes and operator calls are counted in place of a GPU's figures.

    Example: brainscale bench step --json results.jsonl

    Example: brainscale bench step --sizes S,H --patches 8,16 --objectives mae,jepa --batch 8

    Example: brainscale bench step zero.stage=2 data.crop_voxels_zyx=[128,128,128]

    Parameters
    ----------
    overrides
        Settings as key=value in place of the presets'; data.crop_voxels_zyx is the volume.
    sizes
        Some of S, B, L, H, such as B,L. These, --patches and --objectives are measured in every combination and form.
    patches
        Some of 8, 12, 16.
    objectives
        Some of mae, spectral, spectral-patch, jepa, vcr.
    batch
        Volumes of a step. 0: a power of two, by memory.
    quick
        Few rounds; on a GPU ViT-B/16 alone, on a CPU two volumes and nothing compiled.
    json
        File that the lines are appended to.
    """
    from brainscale.bench import step as bench_step
    from brainscale.bench.record import announce, write

    announce("step")
    found = bench_step.run(
        overrides, quick, _words(sizes), _numbers("patches", patches), _words(objectives), batch
    )  # fmt: skip
    write(found, json)


def scaling(
    *overrides: str,
    config: Path | None = None,
    ranks: str = "",
    stages: str = "",
    quick: bool = False,
    json: Path | None = None,
) -> None:
    """Time steps on 1 to n ranks of this host, weak and strong, by ZeRO stage, and count what they send, beside what
    `brainscale plan` predicts.

    Without a GPU over gloo, one thread a rank: bytes, collectives and what communication costs, not what a cluster
    reaches. Needs no torchrun: it starts its own processes.

    Example: brainscale bench scaling --json results.jsonl

    Example: brainscale bench scaling --config configs/mae_vit_b.toml --ranks 1,2,4,8 train.global_batch_volumes=64

    Parameters
    ----------
    overrides
        Settings as key=value; train.global_batch_volumes is the batch of one rank (weak) and of all (strong). Without
        data.store, a store of synthetic brains at 2 mm is made.
    config
        Settings of the run that is measured (TOML). None: ViT-B on GPUs, a small model on a CPU.
    ranks
        Numbers of ranks, such as 1,2,4. None: 1, 2, 4 (and 8 GPUs), as far as each has a core or a GPU of its own.
    stages
        ZeRO stages, such as 1,3. None: 1, 2 and 3; quick: 1.
    quick
        A small model, ZeRO 1 and few rounds.
    json
        File that the lines are appended to.
    """
    from brainscale.bench import scaling as bench_scaling
    from brainscale.bench.record import announce, write

    announce("scaling")
    write(bench_scaling.run(overrides, quick, config, _numbers("ranks", ranks), _numbers("stages", stages)), json)


def roofline(
    *, gpu: str = "h200", out: Path | None = None, markdown: Path | None = None, results: tuple[Path, ...] = ()
) -> None:
    """Say what limits each preset on a GPU: FLOPs and bytes of the parts of a step, by formula, against its roofs.

    Measures nothing and needs no GPU. Prints the table; writes the picture where --out says.

    Example: brainscale bench roofline --out roofline.svg

    Example: brainscale bench roofline --gpu h200 --out roofline.svg --results gpu.jsonl

    Parameters
    ----------
    gpu
        h100-sxm, h100-pcie, h200, a100-40, a100-80, l40s, b200.
    out
        Picture (SVG).
    markdown
        File for the table; none: it is printed.
    results
        Files of lines; steps that were measured on this GPU (bench step) stand in the picture as stars.
    """
    from brainscale.bench import roofline as bench_roofline
    from brainscale.bench import roofline_picture, schema

    device = bench_roofline.gpu_of(gpu)
    found = bench_roofline.presets(device)
    lines = [line.model_dump() for file in results for line in schema.read(file)]
    measured = roofline_picture.points(lines, found, device)
    if results:
        print(f"{len(measured)} measured steps of {device.name} in {', '.join(map(str, results))}", file=sys.stderr)
    table = bench_roofline.markdown(found, device)
    if markdown is None:
        print(table)
    else:
        markdown.write_text(table, encoding="utf-8")
    if out is not None:
        roofline_picture.draw(found, device, measured, out)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """Whole numbers with commas between them. Raises InputError for anything else."""
    parts = [part.strip() for part in text.split(",")] if text else []
    if bad := [part for part in parts if not part.isdecimal()]:
        raise InputError(f"--{option} {text}: {bad[0]!r} is no whole number; give numbers with commas, such as 1,2,4")
    return tuple(map(int, parts))


def _words(text: str) -> tuple[str, ...]:
    """Words with commas between them."""
    return tuple(part.strip() for part in text.split(",")) if text else ()
