"""From a draw to the voxels of one sample. No torch: the processes that read for DALI import this."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from brainscale import augment
from brainscale.augment import Box, Codes, Noise
from brainscale.geometry import Zyx, token_grid
from brainscale.sampling import Draw
from brainscale.settings import InputError


@dataclass(frozen=True)
class Piece:
    """What is read for one sample."""

    voxels: np.ndarray
    """(z,y,x) of the box, in storage type."""
    box: Box
    foreground: np.ndarray
    """(N,) float32: share of brain or head in every token, 0..1."""


class Reader:
    """Reads samples of a store. Cheap to pickle; safe with many threads."""

    def __init__(self, store: Any, patch_zyx: Zyx, crop_zyx: Zyx | None, seed: int = 0) -> None:
        """store: a `Store` or `Stores`; seed: of noise. Raises InputError when the patch does not divide the crop or
        the foreground's cells do not divide the patch."""
        self.store = store
        self.patch_zyx = patch_zyx
        self.volume_zyx: Zyx = store.volume_zyx if crop_zyx is None else crop_zyx
        self.cell = store.plan.foreground_cell_voxels
        self.grid_zyx = token_grid(self.volume_zyx, patch_zyx)
        if any(p % self.cell for p in patch_zyx):
            raise InputError(
                f"model.patch_voxels_zyx {patch_zyx} must be a multiple of the store's foreground cell of {self.cell} "
                "voxels; choose another patch or convert with another foreground_cell_voxels"
            )
        self.affine = normalisation(store)
        self._codes = codes(store)
        self._spacing_mm_zyx = spacing_mm_zyx(store)
        self.zero_background = not self._codes[0].any()
        self.noise = Noise(seed, self.volume_zyx)

    def at(self, row: int) -> int:
        """Where a row stands in the store's columns."""
        return int(np.searchsorted(self.store.rows, row))

    def codes(self, row: int) -> Codes:
        """What the codes of a row mean."""
        background, low, high = self._codes[:, self.at(row)].tolist()
        return Codes(background, low, high)

    def spacing_mm_zyx(self, row: int) -> np.ndarray:
        """(3,) distance of a row's voxels."""
        return self._spacing_mm_zyx[self.at(row) if len(self._spacing_mm_zyx) > 1 else 0]

    def centre(self) -> Zyx:
        """Corner of the crop in the middle of a volume, on the foreground's cells."""
        z, y, x = ((v - c) // 2 // self.cell * self.cell for v, c in zip(self.store.volume_zyx, self.volume_zyx))
        return z, y, x

    def piece(self, d: Draw) -> Piece:
        """Read what a sample needs. Raises StoreDamage, naming row and file, for data that is damaged."""
        spacing = self.spacing_mm_zyx(d.row)
        box = augment.box_of(d.corner_zyx, self.volume_zyx, self.store.volume_zyx, d.change, spacing)
        if box.size_zyx == self.store.volume_zyx:
            voxels = self.store.volumes([d.row])[0]
        else:
            voxels = self.store.crop(d.row, box.corner_zyx, box.size_zyx)
        cells = self.store.foreground([d.row])[0]
        return Piece(voxels, box, self._foreground(cells, d, box))

    def sample(self, d: Draw) -> tuple[np.ndarray, np.ndarray]:
        """Voxels (Z,Y,X) in storage type and foreground shares (N,) of one draw. Raises as `piece`."""
        piece, code = self.piece(d), self.codes(d.row)
        volume = augment.placed(piece.voxels, piece.box, self.volume_zyx, d.change, code.background)
        volume = volume[:, :, ::-1] if d.flip else volume
        if d.change.alters:
            volume = augment.altered(volume, d.change, code, self.spacing_mm_zyx(d.row), self.noise)
        return np.ascontiguousarray(augment.rounded(volume, self.store.dtype)), piece.foreground

    def _foreground(self, cells: np.ndarray, d: Draw, box: Box) -> np.ndarray:
        """Shares per token of the cells (GZ,GY,GX) of a whole volume, moved as the voxels are."""
        size: Any = tuple(n // self.cell for n in self.volume_zyx)
        if d.change.moves:
            middle = (self.cell - 1) / 2
            first = box.linear_zyx @ np.full(3, middle) + box.offset_zyx + box.corner_zyx
            moved = ndimage.affine_transform(
                cells, box.linear_zyx, (first - middle) / self.cell, size, np.float32, 1, "grid-constant", 0.0
            )
        else:
            corner: Any = tuple(n // self.cell for n in d.corner_zyx)
            there = augment.box_of(corner, size, cells.shape, d.change, np.ones(3))
            within = tuple(slice(c, c + s) for c, s in zip(there.corner_zyx, there.size_zyx))
            moved = augment.placed(cells[within], there, size, d.change, 0)
        moved = moved[:, :, ::-1] if d.flip else moved
        (gz, gy, gx), (cz, cy, cx) = self.grid_zyx, (p // self.cell for p in self.patch_zyx)
        return moved.reshape(gz, cz, gy, cy, gx, cx).mean((1, 3, 5), dtype=np.float32).reshape(-1) / np.float32(255)


def normalisation(store: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(scale, offset, low, high), each (rows,) float32: value = clamp(code × scale + offset, low, high), which is a
    foreground z-score, 0..1 between the clip bounds, or the original unit, as the plan's `normalize` says."""
    columns = ("scale", "offset", "mean", "std", "clip_low", "clip_high")
    scale, offset, mean, std, low, high = (store.column(name).astype(np.float64) for name in columns)
    centre, unit = {
        "zscore": (mean, std),
        "unit_range": (low, high - low),
        "none": (np.zeros_like(mean), np.ones_like(std)),
    }[store.plan.normalize]
    parts = (scale / unit, (offset - centre) / unit, (low - centre) / unit, (high - centre) / unit)
    return tuple(part.astype(np.float32) for part in parts)


def codes(store: Any) -> np.ndarray:
    """(3, rows): the code of background and those of the clip bounds."""
    background, scale, offset, low, high = (
        store.column(name).astype(np.float64)
        for name in ("background_code", "scale", "offset", "clip_low", "clip_high")
    )
    return np.stack([background, (low - offset) / scale, (high - offset) / scale])


def spacing_mm_zyx(store: Any) -> np.ndarray:
    """(rows, 3), or (1, 3) where the plan says it for all: distance of stored voxels along z, y, x."""
    if store.plan.spacing_mm_xyz != "native":
        return np.array([store.plan.spacing_mm_xyz[::-1]])
    affines = store.column("affine_stored").reshape(-1, 4, 4)
    return np.linalg.norm(affines[:, :3, :3], axis=1)[:, ::-1]
