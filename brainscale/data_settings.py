"""Settings of where volumes come from, in which order, and how they are altered."""

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from brainscale.settings import Model


class WeightedStore(Model):
    """One of several stores."""

    path: str
    """Path of a finished store."""
    weight: float = Field(gt=0)
    """Share of the samples that come from it, relative to the other stores' weights."""


class Data(Model):
    """Where volumes come from."""

    store: str = ""
    """Path of a finished store."""
    stores: tuple[WeightedStore, ...] = ()
    """Several stores of one plan in place of `store`, each with its share of the samples."""
    sampler: Literal["uniform", "weighted", "subject_balanced"] = "uniform"
    """Order of the scans of a store (`samplers.py` states what each guarantees). uniform: every scan once per epoch;
    weighted: groups of scans in the shares of `weights`; subject_balanced: every subject once per epoch."""
    weight_column: str = "contrast"
    """Column of scans.parquet that `weights` is about, e.g. contrast, or participant_site."""
    weights: dict[str, float] = Field(default={})
    """Share of the samples for each value of that column, relative to one another; 0 leaves scans out."""
    loader: Literal["auto", "torch", "dali"] = "auto"
    """Which loader feeds the run; both give the same batches. auto: DALI where there is a GPU and it is installed."""
    workers: int = Field(default=2, ge=1)
    """Threads (torch) or processes (DALI) of every rank that read and decode ahead of the step."""
    prefetch_mb: int = Field(default=4096, gt=0)
    """Most memory of the host that every rank may hold in batches read ahead."""
    timeout_s: float = Field(default=300.0, gt=0)
    """A batch that does not come for this long ends the run (exit 5) with the scans that it waits for."""
    crop_voxels_zyx: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    """Size of a random crop; none: whole volumes. An axis longer than the store's is padded with background."""
    flip_fraction: float = Field(default=0.0, ge=0, le=1)
    """Share of samples mirrored left-right. 0 by default: brains are not symmetric."""
    holdout_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of subjects kept out of training and used for held-out evaluation."""

    @model_validator(mode="after")
    def _agree(self) -> "Data":
        if self.store and self.stores:
            raise ValueError("data.store and data.stores exclude each other; give one")
        if len({entry.path for entry in self.stores}) < len(self.stores):
            raise ValueError("data.stores names a store twice; give each once, with the sum of its weights")
        if (self.sampler == "weighted") != bool(self.weights):
            raise ValueError(
                'data.weights and data.sampler = "weighted" need each other, e.g. data.weights = {T1w = 1, FLAIR = 2}'
            )
        if self.weight_column != "contrast" and not self.weights:
            raise ValueError(
                f'data.weight_column = "{self.weight_column}" is for data.sampler = "weighted"; set it too'
            )
        if self.weights and not (min(self.weights.values()) >= 0 < max(self.weights.values())):
            raise ValueError(f"data.weights must be 0 or more, and one of them more, got {self.weights}")
        return self


class Augment(Model):
    """Random changes of training volumes, beside crop and flip: the share of samples that each is done to, and its
    largest size. None by default: masking is what both objectives learn from. Held-out volumes are never changed."""

    affine_fraction: float = Field(default=0.0, ge=0, le=1)
    max_rotation_deg: float = Field(default=10.0, ge=0, le=180)
    """Rotation about each axis in turn, uniform between minus and plus this."""
    max_scale: float = Field(default=1.1, ge=1, le=2)
    """Size, log-uniform between one part in this and this, the same along all axes."""
    gamma_fraction: float = Field(default=0.0, ge=0, le=1)
    max_gamma: float = Field(default=1.5, ge=1)
    """Exponent of intensities (0..1 between the row's clip bounds), log-uniform as `max_scale`."""
    gain_fraction: float = Field(default=0.0, ge=0, le=1)
    max_gain: float = Field(default=1.2, ge=1)
    """Factor of intensities, log-uniform as `max_scale`."""
    bias_fraction: float = Field(default=0.0, ge=0, le=1)
    max_bias: float = Field(default=1.4, ge=1)
    """Smooth field of factors that lies between one part in this and this."""
    noise_fraction: float = Field(default=0.0, ge=0, le=1)
    max_noise_std: float = Field(default=0.05, ge=0)
    """Standard deviation of Gaussian noise as a share of the range between the clip bounds, uniform from 0."""
    blur_fraction: float = Field(default=0.0, ge=0, le=1)
    max_blur_mm: float = Field(default=1.0, ge=0)
    """Standard deviation of a Gaussian blur, uniform from 0."""

    @property
    def changes_nothing(self) -> bool:
        """Whether no sample is changed."""
        return not any(value for name, value in self if name.endswith("_fraction"))
