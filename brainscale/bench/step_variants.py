"""The variants that `brainscale bench step` times in turn, and the batch at which all of them fit."""

import os
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import brainscale.distributed as distributed  # first: it tells DeepSpeed about the device
from brainscale.bench import step_peers as peers
from brainscale.bench.step_peers import MAE, Case, MonaiStep, OurStep
from brainscale.engine import compiles
from brainscale.loader import Batch
from brainscale.ops import choose

LEAST_BATCH, MAX_BATCH, CPU_MAX_BATCH, MEMORY_SHARE = 2, 128, 4, 0.85
"""VCR compares volumes, so one is not enough."""
MONAI_FORMS = {
    peers.EAGER: ("conv", False),
    f"{peers.EAGER}, perceptron": ("perceptron", False),
    f"{peers.MONAI}, torch.compile, perceptron": ("perceptron", True),
}
"""How patches are projected, and whether it is compiled: in its default form, in its better one, and at its best."""
PLAIN, OFF, ON, GRAPHS = "plain PyTorch", "compile off", "compile on", "compile with CUDA graphs"


class Model(NamedTuple):
    """What one process measures. forms: ours also without kernels, without and with compilation, and MONAI's."""

    case: Case
    objectives: tuple[str, ...]
    forms: bool
    compiles: bool


# --------------------------------------------------------------------------------------------- variants


class Given(NamedTuple):
    """A batch as ours takes it, and as MONAI's does (None: nobody asks)."""

    batch: Batch
    floats: Tensor | None


@dataclass(frozen=True)
class Variant:
    """Something to be timed. form: kernels and compilation, in words; state_bytes: of its weights and states."""

    step: OurStep | MonaiStep
    form: str
    state_bytes: int

    def __call__(self, given: Given) -> None:
        self.step(given.batch if isinstance(self.step, OurStep) else given.floats)  # type: ignore[arg-type]


class Builder:
    """Makes the variants of a model; engines are shared by those that differ in terms of the loss and kernels alone."""

    def __init__(self, model: Model, batch: int, world: distributed.World) -> None:
        self.model, self.batch, self.world = model, batch, world
        self.engines: dict[tuple[str, str], tuple[Any, int]] = {}
        self.attention: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        """Variants that do not run here, and why."""

    def variants(self) -> dict[str, Variant]:
        """By name: MONAI's first, the reference before all."""
        found = self.monai() if self.model.forms else {}
        for objective in self.model.objectives:
            found |= self.ours(objective)
        return found

    def monai(self) -> dict[str, Variant]:
        """MONAI's, in the shapes of our MAE."""
        case, found = self.model.case, dict[str, Variant]()
        config = case.settings(MAE, self.batch)
        for name, (projection, compiled) in MONAI_FORMS.items():
            if reason := peers.missing():
                self.skipped[name] = reason
            elif self.model.compiles or name == peers.EAGER:
                before = allocated_bytes(self.world)
                step = MonaiStep(case, config, self.world, projection, compiled)
                form = f"{projection}, {'torch.compile' if compiled else 'eager'}, {step.shape}"
                found[name] = Variant(step, form, allocated_bytes(self.world) - before)
        return found

    def ours(self, objective: str) -> dict[str, Variant]:
        """As configured; and in the forms that differ from that here: all of MAE, the plain one of the others."""
        configured, settings = self._variant(objective, ""), self.model.case.settings(objective, self.batch)
        found = {objective: configured}
        forms = [PLAIN, OFF, ON, *([GRAPHS] if self.world.device.type == "cuda" else [])]
        for form in (forms if objective == MAE else [PLAIN]) if self.model.forms else []:
            if form in (ON, GRAPHS) and not (self.model.compiles and settings.zero.stage < 3):
                continue
            variant, name = self._variant(objective, form), f"{objective}, {form}"
            if form != GRAPHS and variant.form == configured.form:
                self.skipped[name] = f"the same as {objective} here: {configured.form}"
            else:
                found[name] = variant
        return found

    def _variant(self, objective: str, form: str) -> Variant:
        """An objective as configured (form "") or in another form."""
        compile_ = {"": (), ON: ("train.compile=true",)}.get(form, ("train.compile=false",))
        kernels = ('kernels="reference"',) if form == PLAIN else ()
        config = self.model.case.having(*compile_, *kernels).settings(objective, self.batch)
        compiled = GRAPHS if form == GRAPHS else ON if compiles(config, self.world) else OFF
        key = config.objective, compiled
        if key not in self.engines:
            before = allocated_bytes(self.world)
            engine = peers.start_engine(config, self.model.case.volume_zyx, self.world, form == GRAPHS)
            self.engines[key] = engine, allocated_bytes(self.world) - before
        engine, state_bytes = self.engines[key]
        kernels_are = "Triton kernels" if choose(config.kernels, self.world.device) == "triton" else PLAIN
        attends = self.attention.get(config.objective) or peers.choose_attention(config, self.model.case, self.world)
        self.attention[config.objective] = attends
        words = f"{kernels_are}, {compiled}, attention {attends}"
        return Variant(OurStep(engine, config, self.world, attends), words, state_bytes)


def allocated_bytes(world: distributed.World) -> int:
    """Of a GPU's memory, by tensors; 0 on a CPU."""
    return torch.cuda.memory_allocated() if world.device.type == "cuda" else 0


# --------------------------------------------------------------------------------------------- batch


def fitting_batch(model: Model) -> tuple[int, str]:
    """The largest power of two at which a step of every variant fits, and by what; run in a process of its own, whose
    compiled variants run uncompiled."""
    world = peers.in_world()
    builder = Builder(model, 1, world)
    variants = builder.variants()
    if world.device.type == "cuda":
        limit, most = MEMORY_SHARE * torch.cuda.get_device_properties(world.device).total_memory, MAX_BATCH
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        limit, most = _peak_bytes(world) + MEMORY_SHARE * free, CPU_MAX_BATCH
    batch, tried = most, LEAST_BATCH
    with torch.compiler.set_stance("force_eager"):
        for name, variant in variants.items():

            def peak_bytes(volumes: int, variant: Variant = variant) -> float:
                nonlocal tried
                tried = volumes
                given = next(batches(model.case, volumes, 1, world, model.forms))
                if world.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                variant(given)
                return _peak_bytes(world)

            try:
                batch = min(batch, largest_batch(peak_bytes, _peak_bytes(world), limit, batch))
            except torch.OutOfMemoryError:
                print(f"{name} does not fit at batch {tried}", file=sys.stderr, flush=True)
                batch = tried // 2 if tried > LEAST_BATCH else batch  # else its line will say so
    return batch, f"at most {most}" if batch == most else f"{MEMORY_SHARE:.0%} of memory"


def largest_batch(peak_bytes: Callable[[int], float], empty_bytes: float, limit_bytes: float, most: int) -> int:
    """Double from LEAST_BATCH on, up to `most`, while a straight line through the last two peaks stays within the
    limit, so that memory does not run out on the way."""
    batch, last, last_bytes = LEAST_BATCH, 0, empty_bytes
    while 2 * batch <= most:
        now_bytes = peak_bytes(batch)
        if now_bytes + (now_bytes - last_bytes) * batch / (batch - last) > limit_bytes:
            break
        batch, last, last_bytes = 2 * batch, batch, now_bytes
    return batch


def _peak_bytes(world: distributed.World) -> float:
    """Most memory so far: of the GPU since it was reset, or of this process."""
    if world.device.type == "cuda":
        return float(torch.cuda.max_memory_allocated())
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def batches(case: Case, batch: int, copies: int, world: distributed.World, floats: bool) -> Iterator[Given]:
    """Batches on the device. floats: also as MONAI's takes them."""
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    for made in peers.make_batches(case, batch, copies, world.device):
        yield Given(made, peers.as_floats(made, dtype) if floats else None)
