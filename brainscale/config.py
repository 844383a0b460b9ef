"""All settings of a run; where volumes come from is in data_settings.py, what is saved and watched in
monitor_settings.py. Those of a store are in prep_plan.py.

A quantity carries its unit in its name (`_mm`, `_voxels`, `_steps`, `_fraction` in 0..1) and its axis order (`_xyz` as
in NIfTI, `_zyx` as in memory). How they are read is in settings.py.
"""

import math
from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from brainscale.data_settings import Augment, Data
from brainscale.monitor_settings import Checkpoint, Health, Log, Probe, profiled_steps
from brainscale.settings import Model


class ModelSettings(Model):
    """The encoder (a 3D vision transformer)."""

    width: int = Field(default=768, gt=0)
    depth: int = Field(default=12, gt=0)
    heads: int = Field(default=12, gt=0)
    patch_voxels_zyx: tuple[PositiveInt, PositiveInt, PositiveInt] = (16, 16, 16)
    position: Literal["rope", "sincos"] = "rope"
    """Rotary positions in every attention, or fixed sine-cosine vectors added once."""


MAX_BLOCKS = 64
"""Blocks drawn for a sample; the few cells that they may leave uncovered are hidden last."""


class Mask(Model):
    """Which tokens are hidden."""

    fraction: float = Field(default=0.75, gt=0, lt=1)
    """Share of tokens masked: exactly round(fraction × tokens) in every sample."""
    kind: Literal["auto", "random", "blocks"] = "auto"
    """Single tokens, or blocks of them; auto: blocks for JEPA, single tokens for MAE."""
    block_fractions: tuple[tuple[float, float], ...] = ((0.0, 0.2), (0.2, 0.5), (0.5, 0.7))
    """Scales of blocks, as shares of the grid's tokens (low, high). Every sample draws one scale, and blocks of it
    until the fraction is hidden."""
    block_aspect: tuple[float, float] = (0.75, 1.5)
    """Each edge of a block is stretched by its own factor between these, at the same volume."""
    foreground_aware: bool = False
    """Hide the fraction of the tokens that hold foreground and of those that do not, each by itself."""
    shared: bool = False
    """One mask for all samples of an optimizer step, in place of one per sample."""

    @model_validator(mode="after")
    def _agree(self) -> "Mask":
        if not self.block_fractions or not all(0 <= low < high <= 1 for low, high in self.block_fractions):
            raise ValueError(f"mask.block_fractions must be pairs that rise within 0..1, got {self.block_fractions}")
        for low, high in self.block_fractions:
            if 1 - (1 - (low + high) / 2) ** MAX_BLOCKS < self.fraction:
                raise ValueError(
                    f"mask.block_fractions ({low}, {high}): {MAX_BLOCKS} blocks of that size, the most that are drawn, "
                    f'do not hide mask.fraction = {self.fraction}; use larger blocks or mask.kind = "random"'
                )
        if not 0 < self.block_aspect[0] <= self.block_aspect[1]:
            raise ValueError(f"mask.block_aspect must rise and be positive, got {self.block_aspect}")
        return self


class Mae(Model):
    """Decoder and voxel loss of the masked autoencoder."""

    decoder_width: int = Field(default=384, gt=0)
    decoder_depth: int = Field(default=8, gt=0)
    decoder_heads: int = Field(default=6, gt=0)
    pixel_loss: Literal["mse", "l1"] = "mse"
    normalize_target: bool = False
    """Each masked patch is z-scored before the voxel loss (predictions are de-normalised for the spectral term)."""
    decode_fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the masked tokens that a training step decodes and compares: round(fraction × masked) of every sample,
    drawn anew for each. Evaluations decode all."""


class Spectral(Model):
    """The FFT-magnitude term. Native: every step, mean over kept bins, independent of volume size. `compat = "paper"`:
    the published formula and its amortisation (arXiv 2606.13315)."""

    weight: float = Field(default=0.01, ge=0)
    """λ. 0 switches the term off. The native default has the gradient weight of the paper's λ=1, n=10 (λ/n²)."""
    mode: Literal["logmag", "magnitude", "complex"] = "logmag"
    scope: Literal["volume", "patch"] = "volume"
    """The whole mosaic, or each masked patch by itself."""
    cutoff_fraction: float = Field(default=0.3, ge=0, lt=1)
    """Radial high-pass: bins nearer to zero frequency than this share of the corner's radius are left out."""
    log_scale: float = Field(default=math.sqrt(160**3), gt=0)
    """s in log1p(s·|F|) of the orthonormal transform; √(160³) equals the paper's scale at 160³."""
    every_steps: int = Field(default=1, ge=1)
    warmup_steps: int = Field(default=0, ge=0)
    """Linear ramp of λ from 0."""
    compat: Literal["native", "paper"] = "native"


class Jepa(Model):
    """Predictor, teacher and loss of the joint-embedding predictive architecture."""

    predictor_width: int = Field(default=384, gt=0)
    predictor_depth: int = Field(default=6, gt=0)
    predictor_heads: int = Field(default=6, gt=0)
    momentum: float = Field(default=0.99925, ge=0, le=1)
    """The teacher is momentum × itself + (1 − momentum) × the student after every optimizer step."""
    final_momentum: float | None = Field(default=None, ge=0, le=1)
    """Where the momentum goes, linearly over the run; unset: it stays."""
    background_weight: float = Field(default=0.1, ge=0, le=1)
    """Weight in the loss of target tokens that hold hardly any foreground; the others weigh 1."""
    min_foreground_fraction: float = Field(default=0.1, ge=0, le=1)
    """Share of foreground from which a token weighs 1."""


class Regularizer(Model):
    """What keeps the embeddings of a JEPA from collapsing, besides its teacher: variance and covariance of embeddings
    over all volumes of a micro-batch on all ranks ("vcr"), or their distance to a standard normal ("sigreg")."""

    kind: Literal["none", "vcr", "sigreg"] = "none"
    weight: float = Field(default=0.025, ge=0)
    """Weight in the loss. Usual: 0.025 for vcr, 0.25 for vcr with compat = "paper", 0.05 for sigreg."""
    variance_weight: float = Field(default=1.0, ge=0)
    """Of the hinge on standard deviations."""
    covariance_weight: float = Field(default=0.04, ge=0)
    """Of the squared off-diagonal covariances. Paper: 0.1."""
    target_std: float = Field(default=1.0, gt=0)
    """Standard deviation that the hinge asks for."""
    compat: Literal["native", "paper"] = "native"
    """native: of one pooled vector per volume; paper: of all tokens (arXiv 2606.13315), needs mask.shared = true."""
    slices: int = Field(default=512, gt=0)
    """Random directions of sigreg."""
    knots: int = Field(default=17, ge=2)
    """Points in 0..3 at which sigreg compares characteristic functions."""


class Train(Model):
    """Length, batch and precision."""

    num_steps: int = Field(default=100_000, gt=0)
    """Optimizer steps."""
    global_batch_volumes: int = Field(default=256, gt=0)
    """Volumes per optimizer step over all ranks and accumulation."""
    micro_batch_volumes: int = Field(default=32, gt=0)
    """Volumes per forward pass of one rank, at most; lowered to what one rank's share allows."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: fp32 master weights, fp32 accumulation and reduction of gradients, no loss scaling. fp32: all of fp32, on a
    GPU without tensor cores (TF32 is switched off), for comparisons."""
    grad_clip: float = Field(default=1.0, gt=0)
    """Largest global gradient norm."""
    compile: Literal["auto"] | bool = "auto"
    """torch.compile of every block in training steps (ZeRO stages 0 to 2). auto: wherever it can be, on a GPU."""
    attention: Literal["auto", "cudnn", "flash", "flash3", "flash4", "efficient", "math"] = "auto"
    """The kernel of attention, all others being off. auto: on a GPU the fastest for the run's shapes, measured at the
    start and kept; on a CPU torch's own choice (`attention.py`)."""
    activation_checkpointing: Literal["auto"] | bool = "auto"
    """Keep only the inputs of blocks and compute them again in the backward pass: less memory, up to a third more work,
    the same results. auto: of as few blocks as the GPU's memory asks for, by prediction; none on a CPU."""
    profile: str = ""
    """Steps to record as a trace and a table by phase in RUN/profile (`profiling.py`): "steps 20-25" or "step 20",
    counted from 1 as in metrics.jsonl; "": none. Changes no result."""
    stop_after_min: float = Field(default=0.0, ge=0)
    """Save and stop (exit 75) this many minutes after the start of the process; 0: no limit. A Slurm job's own end is
    watched without it."""

    @model_validator(mode="after")
    def _agree(self) -> "Train":
        profiled_steps(self.profile, self.num_steps)
        return self


class Optim(Model):
    """AdamW with linear warm-up, then a cosine or a plateau with a cooldown."""

    lr: float = Field(default=1.5e-4, gt=0)
    schedule: Literal["cosine", "cooldown"] = "cosine"
    """After the warm-up: a cosine to the end; or constant, then linear to the final rate over `cooldown_steps`, so that
    a run can be prolonged before it cools down."""
    cooldown_steps: int = Field(default=0, ge=0)
    final_lr_fraction: float = Field(default=0.01, ge=0, le=1)
    weight_decay: float = Field(default=0.05, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    warmup_steps: int = Field(default=2000, ge=0)


class Zero(Model):
    """DeepSpeed's sharding."""

    stage: Literal[0, 1, 2, 3] = 1
    """0 shards nothing (fp32 only), 1 optimizer states over ranks, 2 gradients as well, 3 weights as well. bf16 with
    accumulation shards gradients too, which is said at the start: at 1 DeepSpeed would not accumulate in fp32."""
    offload_optimizer: bool = False
    """Keep optimizer states and the fp32 master in host memory and step there: slower, for models that do not fit."""


class Run(Model):
    """Where the run lives."""

    dir: str = ""
    """Run folder; default runs/<config name>."""


class Config(Model):
    """One pretraining run."""

    objective: Literal["mae", "jepa"] = "mae"
    seed: int = Field(default=0, ge=0, lt=2**32)
    kernels: Literal["auto", "triton", "reference"] = "auto"
    """Which implementation of gathers and losses runs: Triton, plain PyTorch, or (auto) Triton where there is a GPU."""
    data: Data = Data()
    augment: Augment = Augment()
    model: ModelSettings = ModelSettings()
    mask: Mask = Mask()
    mae: Mae = Mae()
    spectral: Spectral = Spectral()
    jepa: Jepa = Jepa()
    regularizer: Regularizer = Regularizer()
    train: Train = Train()
    optim: Optim = Optim()
    zero: Zero = Zero()
    checkpoint: Checkpoint = Checkpoint()
    health: Health = Health()
    probe: Probe = Probe()
    log: Log = Log()
    run: Run = Run()

    @model_validator(mode="after")
    def _agree(self) -> "Config":
        for name, width, heads in (
            ("model", self.model.width, self.model.heads),
            ("mae.decoder", self.mae.decoder_width, self.mae.decoder_heads),
            ("jepa.predictor", self.jepa.predictor_width, self.jepa.predictor_heads),
        ):
            if width % heads or (width // heads) % 2:
                raise ValueError(f"{name}: width {width} must be an even multiple of its {heads} heads")
        if self.optim.warmup_steps >= self.train.num_steps:
            raise ValueError(
                f"optim.warmup_steps {self.optim.warmup_steps} must be below train.num_steps {self.train.num_steps}"
            )
        if self.optim.warmup_steps + self.optim.cooldown_steps > self.train.num_steps:
            raise ValueError(
                f"optim.warmup_steps {self.optim.warmup_steps} and cooldown_steps {self.optim.cooldown_steps} are more "
                f"than train.num_steps {self.train.num_steps}"
            )
        if self.optim.schedule == "cosine" and self.optim.cooldown_steps:
            raise ValueError('optim.cooldown_steps needs optim.schedule = "cooldown"')
        if self.regularizer.kind != "none" and self.objective != "jepa":
            raise ValueError(
                f'regularizer.kind = "{self.regularizer.kind}" is for objective = "jepa"; set it to "none"'
            )
        if self.regularizer.kind == "vcr" and self.regularizer.compat == "paper" and not self.mask.shared:
            raise ValueError(
                'regularizer.compat = "paper" takes the deviation of a token position over the batch, so all samples '
                "must show the same positions, and masks are drawn per sample; set mask.shared = true or "
                'regularizer.compat = "native"'
            )
        if self.mask.shared and self.mask.foreground_aware:
            raise ValueError("mask.foreground_aware draws masks by each volume's foreground; set mask.shared = false")
        if self.train.precision == "bf16" and self.zero.stage == 0:
            raise ValueError(
                "train.precision bf16 with zero.stage 0 is another optimizer in DeepSpeed, which counts one step too "
                'many; set zero.stage = 1, or train.precision = "fp32"'
            )
        if self.train.compile is True and self.zero.stage == 3:
            raise ValueError("train.compile works with zero.stage 0 to 2; set another stage or train.compile = false")
        if self.zero.offload_optimizer and self.zero.stage == 0:
            raise ValueError("zero.offload_optimizer needs sharded states; set zero.stage to 1, 2 or 3")
        if self.mae.decode_fraction < 1 and self.spectral.weight and self.spectral.scope == "volume":
            raise ValueError(
                f"mae.decode_fraction = {self.mae.decode_fraction} leaves holes in the mosaic whose spectrum "
                'spectral.scope = "volume" compares; set spectral.scope = "patch", spectral.weight = 0 or '
                "mae.decode_fraction = 1"
            )
        if self.spectral.compat == "paper" and self.spectral.scope != "volume":
            raise ValueError('spectral.compat = "paper" is defined on whole volumes; set spectral.scope = "volume"')
        return self


MAY_CHANGE_ON_RESUME = (
    "train.num_steps", "train.profile", "train.stop_after_min", "train.activation_checkpointing",
    "train.compile", "train.attention", "train.micro_batch_volumes", "log", "checkpoint", "health", "probe",
    "data.store", "data.loader", "data.workers", "data.prefetch_mb", "data.timeout_s", "zero", "kernels", "run",
)  # fmt: skip
"""Keys (or groups) that a resumed run may set to another value without `--allow-change`. A store may move: what is
compared are the hashes of its plan and scans."""
