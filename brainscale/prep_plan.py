"""How a scan becomes a row of a store: the preprocessing contract.

A quantity carries its unit and its axis order in its name, as in config.py.
"""

import hashlib
import json
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from brainscale.settings import Model


class Plan(Model):
    """How a scan becomes a row of the store: the preprocessing contract. Its hash travels in every checkpoint."""

    grid_voxels_xyz: tuple[int, int, int] | Literal["largest"] = (160, 192, 160)
    """Voxels of every stored volume; "largest": the smallest grid that holds every scan of the source."""
    spacing_mm_xyz: tuple[float, float, float] | Literal["native"] = (1.0, 1.0, 1.0)
    """Spacing after resampling; "native" keeps each scan's own voxels."""
    orientation: Literal["RAS", "LAS", "RPS", "LPS", "RAI", "LAI", "RPI", "LPI"] = "RAS"
    """Where x, y and z of a stored volume point: right or left, anterior or posterior, superior or inferior."""
    assume_orientation: Literal["", "RAS", "LAS", "RPS", "LPS", "RAI", "LAI", "RPI", "LPI"] = ""
    """Orientation of scans whose header gives none; "": they are refused (`no_affine`)."""
    frame: int | None = Field(default=None, ge=0)
    """Frame taken from 4D scans, counted from 0; unset: they are refused (`four_d`)."""
    min_extent_mm: float = Field(default=40.0, ge=0)
    """A scan that is thinner along an axis is refused (`thin_slab`)."""
    crop: Literal["foreground", "centre"] = "foreground"
    """Where the grid lies: on the foreground's bounding box (a tall head aligned at its top), or centre on centre."""
    top_margin_mm: float = Field(default=5.0, ge=0)
    """Distance kept above a foreground that is taller than the grid."""
    foreground: Literal["auto", "otsu", "nonzero", "mask", "none"] = "auto"
    """What counts as head or brain: above Otsu's threshold, above a constant background, inside the mask that comes
    with the scan, or everything; "auto" takes the mask where one is given, else "nonzero" for volumes that are
    already skull-stripped, else "otsu"."""
    foreground_cell_voxels: int = Field(default=4, ge=1)
    """Edge of the cells whose share of foreground is stored."""
    max_cropped_fraction: float = Field(default=0.2, ge=0, le=1)
    """A scan that would lose a larger share of its foreground is refused (`does_not_fit`)."""
    warn_cropped_fraction: float = Field(default=0.01, ge=0, le=1)
    """A scan that loses a larger share of its foreground carries the warning `cropped`."""
    clip_percentiles: tuple[float, float] = (0.5, 99.5)
    """Percentiles of the foreground at which intensities are clipped when read for training (never in the store)."""
    normalize: Literal["zscore", "unit_range", "none"] = "zscore"
    """What training reads (never the store): foreground z-scores, clip bounds mapped to 0..1, or original units."""
    dtype: Literal["int16", "uint8", "float32"] = "int16"
    """Storage type of voxels."""
    quanta_per_std: float = Field(default=512.0, gt=0)
    """Resampled or float data are rounded to foreground standard deviation / quanta_per_std (int16)."""
    codec: Literal["lz4", "zstd"] = "lz4"
    """Compressor inside blosc with byte shuffle; crc32c follows it."""
    chunk_voxels_zyx: tuple[int, int, int] | Literal["rows", "volume"] = "rows"
    """Inner chunk: blocks of at most 16 × 16 whole rows, which serve whole reads and crops (`brainscale bench read`),
    one chunk per volume, or a size that divides the grid."""
    shard_volumes: int = Field(default=0, ge=0)
    """Volumes per shard file; 0: clamp(rows // 64, 1, 32)."""

    @field_validator("grid_voxels_xyz")
    @classmethod
    def _grid(cls, value: Any) -> Any:
        if value != "largest" and min(value) < 1:
            raise ValueError(f"grid_voxels_xyz must be positive, got {value}")
        return value

    @field_validator("spacing_mm_xyz")
    @classmethod
    def _spacing(cls, value: Any) -> Any:
        if value != "native" and not all(0 < s < 100 for s in value):
            raise ValueError(f"spacing_mm_xyz must lie in 0..100 mm, got {value}")
        return value

    @field_validator("chunk_voxels_zyx")
    @classmethod
    def _chunk(cls, value: Any) -> Any:
        if not isinstance(value, str) and min(value) < 1:
            raise ValueError(f"chunk_voxels_zyx must be positive, got {value}")
        return value

    @model_validator(mode="after")
    def _agree(self) -> "Plan":
        low, high = self.clip_percentiles
        if not 0 <= low < high <= 100:
            raise ValueError(f"clip_percentiles must rise within 0..100, got {self.clip_percentiles}")
        if self.grid_voxels_xyz != "largest" and any(g % self.foreground_cell_voxels for g in self.grid_voxels_xyz):
            raise ValueError(
                f"grid_voxels_xyz {self.grid_voxels_xyz} must be a multiple of foreground_cell_voxels "
                f"{self.foreground_cell_voxels}"
            )
        return self

    def hash(self) -> str:
        """32 hex digits over every setting (sorted JSON), independent of versions, paths and machine."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]
