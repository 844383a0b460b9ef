"""What a loader's pace is worth: the model and GPU that it feeds, and how long a consumer waits for it."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from brainscale.bench.loader_passes import BENCH, Pass, Variant, Work, in_turn, synchronize
from brainscale.bench.record import sample_lines, skipped
from brainscale.config import Config
from brainscale.geometry import Zyx
from brainscale.loader import Loader
from brainscale.mae import Mae
from brainscale.masking import draw_masks
from brainscale.settings import load
from brainscale.stores import Stores

CONFIGS = Path(__file__).parents[2] / "configs"
MODELS = {"ViT-S/16": "mae_vit_s.toml", "ViT-B/16": "mae_vit_b.toml", "ViT-L/16": "mae_vit_l.toml"}
GPU_TFLOPS = 394.0
"""Half of what an H200 was measured to reach in bf16 (788)."""
RESIDENT = "the same batch again, no loader"
TRAINING_BATCH, WARMUP_STEPS = 8, 3


class Fed(NamedTuple):
    """How fast a GPU must be to wait for the loader, and how many of GPU_TFLOPS it feeds."""

    starved_tflops: float
    gpu_share: float


def fed(volumes_per_s: float, flops_per_sample: float) -> Fed:
    """What a pace feeds. Pure."""
    tflops = volumes_per_s * flops_per_sample / 1e12
    return Fed(tflops, tflops / GPU_TFLOPS)


def flops(file: str, volume_zyx: Zyx) -> int | None:
    """Of one sample of a MAE, forward and backward; None where its patch does not divide the volume."""
    settings = load(Config, CONFIGS / file, ())
    if any(length % size for length, size in zip(volume_zyx, settings.model.patch_voxels_zyx)):
        return None
    with torch.device("meta"):
        return Mae(settings, volume_zyx).flops()


def feed_lines(lines: list[dict[str, Any]], volume_zyx: Zyx) -> list[dict[str, Any]]:
    """Of measured lines over whole volumes: the same pace, and the models that it feeds."""
    found = []
    for model, file in MODELS.items():
        case = f"feeds {model} MAE, {GPU_TFLOPS:.0f} TFLOP/s a GPU"
        if not CONFIGS.is_dir():
            found.append(skipped(BENCH, case, model, f"{CONFIGS} is not there; run it from a checkout"))
        elif (each := flops(file, volume_zyx)) is None:
            found.append(skipped(BENCH, case, model, f"its patch does not divide volumes of {volume_zyx} (z, y, x)"))
        else:
            for line in lines:
                more = {"case": f"{case}; {line['case']}", "kind": "derived", "pairs": None, "flops_per_sample": each}
                found.append({**line, **more, **fed(line["volumes_per_s"], each)._asdict()})
    return found


# --------------------------------------------------------------------------------------------- waiting


def busy(seconds: float) -> Callable[[], None]:
    """A consumer that multiplies matrices in one thread for so long."""
    matrix = torch.rand(256, 256)

    def consume() -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            matrix @ matrix

    return consume


def pace_lines(
    how: str, work: Work, variants: dict[str, Variant], reference: str, busy_s: float, n: int
) -> list[dict[str, Any]]:
    """Lines over a consumer that is busy for `busy_s` with every batch: seconds per volume, and the share it waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        passes = in_turn(work, variants, n, False, busy(busy_s))
    finally:
        torch.set_num_threads(threads)
    case = f"consumer busy twice as long as our loader takes, whole volumes, warm, {how}"
    seconds = {name: [one.seconds / (work.timed * work.batch) for one in own] for name, own in passes.items()}
    lines = sample_lines(BENCH, case, "s", seconds, reference)
    for line in lines:
        line["idle_share"] = idle_share(passes[line["variant"]])
    return lines


def idle_share(passes: list[Pass]) -> float:
    """Share of the time of all passes for which the consumer waited. Pure."""
    return sum(one.waited_s for one in passes) / sum(one.seconds for one in passes)


def training_lines(
    how: str, work: Work, loaders: dict[str, Callable[[Config], Loader]], workers: int, n: int
) -> list[dict[str, Any]]:
    """Lines over steps of a ViT-L/16 MAE in bf16 on a GPU, fed by our loaders and by one batch that stays: idle_share
    is the share of a step by which the loader makes it longer. None but a skipped line without a GPU.

    loaders: how each is made for the settings of the model.
    """
    case = f"training ViT-L/16 MAE, bf16, AdamW, {how}"
    if work.device.type != "cuda":
        return [skipped(BENCH, case, RESIDENT, "there is no GPU")]
    if flops(MODELS["ViT-L/16"], volume_zyx := Stores([work.path]).volume_zyx) is None:
        return [skipped(BENCH, case, RESIDENT, f"its patch does not divide volumes of {volume_zyx} (z, y, x)")]
    settings = load(Config, CONFIGS / MODELS["ViT-L/16"], (f"data.workers={workers}",))
    found = []
    for name, make in loaders.items():
        loader = make(settings)
        samples = training_seconds(loader, settings, work.fill, work.timed, n)
        lines = sample_lines(BENCH, f"{case}, {name}", "s", {RESIDENT: samples[0], name: samples[1]}, RESIDENT)
        lines[1]["idle_share"] = 1 - lines[1]["ratio"]
        found += lines
    return found


def training_seconds(
    loader: Loader, settings: Config, fill: int, timed: int, n: int
) -> tuple[list[float], list[float]]:
    """Seconds per volume of `timed` steps, with one batch again and again and with the loader's, n of each in turn.
    Before the latter, `fill` steps use up what was read meanwhile."""
    device = loader.device
    model = Mae(settings, loader.reader.volume_zyx).to(device, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    source = loader.batches(0)
    resident, _ = next(source)

    def steps(count: int, loaded: bool) -> float:
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(count):
            batch = next(source)[0] if loaded else resident
            masks = draw_masks(settings, batch.sample_index, batch.foreground, loader.reader.grid_zyx)
            model(batch.to(device), masks.to(device), 0).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        synchronize(device)
        return (time.perf_counter() - begin) / (count * loader.micro_batch)

    try:
        steps(WARMUP_STEPS, False)
        again, fresh = [], []
        for _ in range(n):
            again.append(steps(timed, False))
            steps(fill, True)
            fresh.append(steps(timed, True))
        return again, fresh
    finally:
        source.close()
