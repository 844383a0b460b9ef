"""What `brainscale bench step` times: a training step of this project in its forms, and MONAI's as one would write it.

Both are whole steps: forward, backward, clipping, AdamW, and JEPA's moving teacher, on volumes that lie on the device.
Ours goes through the engine as training does (DeepSpeed, fp32 master weights, masks drawn in the step); MONAI's has its
weights in the type it computes in, no master, and volumes that are floats of that type already.
"""

import importlib
import math
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import clip_grad_norm_
from torch.utils.flop_counter import FlopCounterMode

import brainscale.distributed as distributed  # first: it tells DeepSpeed about the device
from brainscale import attention
from brainscale import engine as deep
from brainscale.config import Config
from brainscale.geometry import Zyx, patchify, token_grid
from brainscale.jepa import Jepa
from brainscale.layers import Trunk, initialise
from brainscale.loader import Batch
from brainscale.masking import draw_masks
from brainscale.metrics import Meter
from brainscale.model_counts import tokens_of
from brainscale.nonfinite import guarded
from brainscale.objective import OBJECTIVES as CLASSES
from brainscale.objective import on_meta
from brainscale.schedules import learning_rate
from brainscale.settings import InputError, load

CONFIGS = Path(__file__).parents[2] / "configs"
INSTALL = "pip install -e '.[peers]'"
MONAI = "MONAI MaskedAutoEncoderViT"
EAGER = f"{MONAI}, eager"
MLP_STEP = 64
"""MONAI's decoder MLP has a multiple of these."""


class Objective(NamedTuple):
    """A preset of configs/ without its size, and what is set in it."""

    preset: str
    overrides: tuple[str, ...] = ()


MAE, SPECTRAL, SPECTRAL_PATCH = "MAE", "MAE + spectral", "MAE + spectral of patches"
JEPA, VCR = "JEPA", "JEPA + VCR"
WHOLE_TARGET = "mae.normalize_target=false"
"""So that the spectral term is all that MAE with it does more, and MONAI's plain squared error is the same work."""
OBJECTIVES = {
    MAE: Objective("mae", (WHOLE_TARGET,)),
    SPECTRAL: Objective("mae_spectral", (WHOLE_TARGET,)),
    SPECTRAL_PATCH: Objective("mae_spectral", (WHOLE_TARGET, 'spectral.scope="patch"')),
    JEPA: Objective("jepa"),
    VCR: Objective("jepa_vcr"),
}


@dataclass(frozen=True)
class Case:
    """One model on one kind of volume. size: S, B, L or H; overrides: a user's settings."""

    size: str
    patch: int
    volume_zyx: Zyx
    precision: str
    overrides: tuple[str, ...] = ()

    def settings(self, objective: str, batch: int) -> Config:
        """Of an objective's preset in this size. Raises InputError where there is none."""
        file = CONFIGS / f"{OBJECTIVES[objective].preset}_vit_{self.size.lower()}.toml"
        if not file.is_file():
            raise InputError(f"{file} is not there; run the benchmark from a checkout, whose presets it measures")
        wanted = (
            f"model.patch_voxels_zyx={[self.patch] * 3}", f'train.precision="{self.precision}"',
            f"train.global_batch_volumes={batch}", f"train.micro_batch_volumes={batch}",
        )  # fmt: skip
        return load(Config, file, (*OBJECTIVES[objective].overrides, *wanted, *self.overrides))

    def having(self, *overrides: str) -> "Case":
        """With more settings."""
        return replace(self, overrides=(*self.overrides, *overrides))

    @property
    def name(self) -> str:
        """Model and shapes."""
        size = "×".join(map(str, self.volume_zyx))
        return f"ViT-{self.size}/{self.patch}, {size} int16, {self.precision}"


# --------------------------------------------------------------------------------------------- volumes


def make_batches(case: Case, batch: int, copies: int, device: torch.device) -> list[Batch]:
    """Random int16 volumes on the device and the numbers of a batch on the CPU, as the loader gives them: smooth and
    noisy, clipped at three standard deviations, foreground everywhere."""
    tokens, found = math.prod(token_grid(case.volume_zyx, (case.patch,) * 3)), []
    for copy in range(copies):
        draw = torch.Generator(device).manual_seed(copy)
        wave = torch.linspace(0, 9, case.volume_zyx[2], device=device).sin()
        noise = torch.randn((batch, 1, *case.volume_zyx), generator=draw, device=device)
        volumes = ((wave + 0.3 * noise) * 400).to(torch.int16)
        scale, offset, low, high = (torch.full((batch,), value) for value in (1 / 300, 0.0, -3.0, 3.0))
        index = np.arange(copy * batch, (copy + 1) * batch)
        found.append(Batch(volumes, scale, offset, low, high, torch.ones(batch, tokens), index, index))
    return found


def as_floats(batch: Batch, dtype: torch.dtype) -> Tensor:
    """Its z-scored volumes (B,1,Z,Y,X)."""
    scale, offset, low, high = (v.to(batch.volumes.device)[:, None, None, None, None] for v in batch.stored[1:])
    return (batch.volumes.float() * scale + offset).clamp(low, high).to(dtype)


# --------------------------------------------------------------------------------------------- ours


def start_engine(config: Config, volume_zyx: Zyx, world: distributed.World, cuda_graphs: bool = False) -> Any:
    """The engine of a new run on such volumes, as `session.build` makes it. cuda_graphs: compile every block with
    them, in place of what `train.compile` says."""
    model = CLASSES[config.objective](config, volume_zyx)
    initialise(model, torch.Generator().manual_seed(config.seed))
    engine = deep.start(model, config, world)
    if isinstance(model, Jepa):
        model.average = deep.follow(engine, model.encoder, model.teacher)
    for trunk in (module for module in model.modules() if cuda_graphs and isinstance(module, Trunk)):
        for block in trunk.blocks:
            block.compile(mode="reduce-overhead", fullgraph=True, dynamic=False)
    return engine


def choose_attention(config: Config, case: Case, world: distributed.World) -> str:
    """The kernel of attention that a run with these settings would take: on a GPU the one that is fastest."""
    with TemporaryDirectory() as no_run:
        tokens = tokens_of(config, case.volume_zyx)
        return attention.decide(config, tokens, config.train.micro_batch_volumes, world, Path(no_run)).backend


def in_world() -> distributed.World:
    """The process group of one process."""
    world = distributed.find()
    distributed.start(world)
    return world


class OurStep:
    """A step of an engine. Several may share one whose model is the same: what the settings say of the terms of the
    loss and of kernels is read in every forward pass."""

    def __init__(self, engine: Any, config: Config, world: distributed.World, backend: str = "torch") -> None:
        """backend: of attention, one of `choose_attention`."""
        self.backend = backend
        self.engine, self.config, self.world, self.model = engine, config, world, engine.module
        self.step, self.meter = 0, Meter(world, engine.module.parts)
        self.flops_per_sample = on_meta(config, self.model.volume_zyx).flops()
        self.parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def __call__(self, batch: Batch) -> None:
        """What `train` does in a step, but for waiting for data and saying how it went."""
        config, engine = self.config, self.engine
        self.model.config = config
        attention.use(self.backend)
        deep.set_learning_rate(engine, learning_rate(config.optim, self.step, config.train.num_steps))
        masks = draw_masks(config, batch.sample_index, batch.foreground, self.model.grid_zyx)
        out = engine(batch.to(self.world.device), masks.to(self.world.device), self.step)
        engine.backward(guarded(out.loss))
        engine.step()
        if not engine.was_step_applied():
            raise ArithmeticError(f"a step of the benchmark's {config.objective} was not finite")
        self.meter.add(out)
        self.model.after_step(self.step)
        self.step += 1

    def mean_loss(self) -> float:
        """Of the steps since it was asked last."""
        loss = self.meter.read()["loss"]
        assert loss is not None, "there was a step"
        return loss


# --------------------------------------------------------------------------------------------- MONAI


def missing() -> str:
    """Why MONAI's cannot run; "" when it can."""
    try:
        importlib.import_module("monai.networks.nets")
    except ImportError:
        return f"MONAI is not installed; {INSTALL}"
    return ""


def make_network(config: Config, volume_zyx: Zyx, projection: str, decoder_mlp: int) -> nn.Module:
    """MONAI's network in our shapes (its own MLP would be 512 wide): depth, widths, heads, patch and share of hidden
    tokens. projection: "conv", its default, or "perceptron". Positions are sine-cosine, its default, or learned where
    the width is no multiple of 6, which it refuses."""
    positions = ["learnable" if width % 6 else "sincos" for width in (config.model.width, config.mae.decoder_width)]
    network: nn.Module = importlib.import_module("monai.networks.nets").MaskedAutoEncoderViT(
        in_channels=1, img_size=volume_zyx, patch_size=config.model.patch_voxels_zyx, hidden_size=config.model.width,
        mlp_dim=4 * config.model.width, num_layers=config.model.depth, num_heads=config.model.heads,
        masking_ratio=config.mask.fraction, decoder_hidden_size=config.mae.decoder_width,
        decoder_mlp_dim=decoder_mlp, decoder_num_layers=config.mae.decoder_depth,
        decoder_num_heads=config.mae.decoder_heads, proj_type=projection, pos_embed_type=positions[0],
        decoder_pos_embed_type=positions[1],
    )  # fmt: skip
    return network


def monai_flops(config: Config, volume_zyx: Zyx, decoder_mlp: int) -> int:
    """FLOPs of one sample's forward and backward pass, by torch's counter, without memory."""
    with torch.device("meta"):
        network = make_network(config, volume_zyx, "perceptron", decoder_mlp)
        volume = torch.empty(1, 1, *volume_zyx)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            prediction, _ = network(volume)
            prediction.sum().backward()
    return counter.get_total_flops()


def same_flops(config: Config, volume_zyx: Zyx) -> tuple[int, int]:
    """Width of MONAI's decoder MLP at which its FLOPs are nearest to ours, and these FLOPs.

    It embeds all patches and predicts the visible ones too, and has a class token, so that with our MLP of 4 × the
    width it would compute more (8 % for ViT-S/16 at 96³): its decoder's MLP is made narrower.
    """
    ours = on_meta(config, volume_zyx).flops()
    wide = 4 * config.mae.decoder_width
    most, less = (monai_flops(config, volume_zyx, width) for width in (wide, wide - MLP_STEP))
    width = max(MLP_STEP, wide - MLP_STEP * round((most - ours) / (most - less)))
    return width, monai_flops(config, volume_zyx, width)


class MonaiStep:
    """A step of MONAI's network, with its usual loss: the mean squared error of masked patches."""

    def __init__(self, case: Case, config: Config, world: distributed.World, projection: str, compiled: bool) -> None:
        dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
        width, self.flops_per_sample = same_flops(config, case.volume_zyx)
        network = make_network(config, case.volume_zyx, projection, width).to(world.device, dtype)
        trained = [p for p in network.parameters() if p.requires_grad]
        self.shape = f"decoder MLP of {width} for the same FLOPs"
        self.parameters, self.patch_zyx = sum(p.numel() for p in trained), config.model.patch_voxels_zyx
        self.network: Any = torch.compile(network, dynamic=False) if compiled else network
        self.trained, self.clip, self.dtype = trained, config.train.grad_clip, dtype
        betas = (config.optim.beta1, config.optim.beta2)
        self.optimizer = torch.optim.AdamW(
            trained, lr=config.optim.lr, betas=betas, weight_decay=config.optim.weight_decay, fused=True
        )
        self.loss = torch.zeros(())

    def __call__(self, volumes: Tensor) -> None:
        """volumes: (B,1,Z,Y,X) in the network's type."""
        attention.use("torch")
        prediction, mask = self.network(volumes)
        error = (prediction - patchify(volumes, self.patch_zyx)).square().mean(-1)
        loss = (error * mask).sum() / mask.sum()
        loss.backward()
        clip_grad_norm_(self.trained, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.loss = loss.detach()

    def mean_loss(self) -> float:
        """Of the newest step."""
        return self.loss.item()
