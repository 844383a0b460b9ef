"""Held-out evaluation: the loss and spectra of fixed volumes during training, and what the reconstruction is worth.

Volumes, crops and masks are fixed for a whole run, so curves compare like with like. Everything is written as numbers
(`RUN/holdout/step-*.npz`, `RUN/reconstruction.json`); `report.py` draws them.

A reconstruction error means little alone: on aligned brains, the average brain beats most short runs. So the model is
compared with the mean of visible neighbours, with the average training brain, and with itself given another subject's
visible tokens (a model that does not look at the subject loses nothing by that).
"""

import itertools
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from brainscale import run_folder
from brainscale.config import Config
from brainscale.geometry import Zyx, patchify
from brainscale.loader import Batch, read_batch
from brainscale.mae import Mae, assemble, patch_deviation
from brainscale.masking import Masks, draw_masks
from brainscale.objective import Objective
from brainscale.provenance import write_text
from brainscale.reader import Reader
from brainscale.sampling import Draw

FIRST_INDEX = 2**62
"""Sample indices of held-out draws start here: their masks are never those of a training sample."""
MASKS_PER_VOLUME = 4
AVERAGE_BRAIN_VOLUMES = 500
"""Training volumes that the average brain is made of, at most (spread evenly over the rows)."""
RADIAL_BINS = 40


@dataclass(frozen=True)
class Case:
    """One held-out volume with one mask, a batch of one on the model's device."""

    batch: Batch
    masks: Masks


class Holdout:
    """The fixed held-out volumes of a run."""

    def __init__(self, reader: Reader, rows: np.ndarray, train_rows: np.ndarray, config: Config) -> None:
        """rows: all held-out rows, of which the first `log.holdout_volumes`, one subject after another, are used."""
        subjects = run_folder.subjects_of(reader.store)[np.searchsorted(reader.store.rows, rows)]
        seen: Counter[str] = Counter()
        turn = []
        for subject in subjects:
            turn.append(seen[subject])
            seen[subject] += 1
        chosen = np.argsort(turn, kind="stable")[: config.log.holdout_volumes]
        self.rows, self.subjects = rows[chosen], subjects[chosen]
        at = np.searchsorted(reader.store.rows, self.rows)
        self.ids, self.contrasts = reader.store.column("id")[at].astype(str), reader.store.column("contrast")[at]
        self.reader, self.train_rows, self.config = reader, train_rows, config

    def case(self, number: int, device: torch.device, mask_number: int = 0) -> Case:
        """The `number`-th held-out volume under its `mask_number`-th mask."""
        index = FIRST_INDEX + number + mask_number * len(self.rows)
        batch = read_batch(self.reader, [Draw(index, int(self.rows[number]), self.reader.centre(), False)])
        masks = draw_masks(self.config, batch.sample_index, batch.foreground, self.reader.grid_zyx)
        return Case(batch.to(device), masks.to(device))

    def other_subject(self, number: int) -> int | None:
        """The next held-out volume of another subject, of the same contrast if possible."""
        others = [(number + k) % len(self.rows) for k in range(1, len(self.rows))]
        others = [i for i in others if self.subjects[i] != self.subjects[number]]
        alike = [i for i in others if self.contrasts[i] == self.contrasts[number]]
        return next(iter(alike or others), None)

    @torch.no_grad()
    def evaluate(self, model: Objective, device: torch.device, step: int, folder: Path | None) -> dict[str, float]:
        """Mean losses over the held-out volumes, for the metrics line; writes spectra and pictures under `folder`, if
        one is given."""
        model.eval()
        losses, spectra, pictures = [], [], []
        for number in range(len(self.rows)):
            case = self.case(number, device)
            losses.append([float(part) for part in model(case.batch, case.masks, None)])
            if not isinstance(model, Mae):
                continue
            true, mosaic, masked = volumes(model, case)
            spectra.append(np.stack([radial_power(true), radial_power(mosaic), radial_power(mosaic - true)]))
            if number < self.config.log.pictures:
                pictures.append(planes(np.stack([true, masked, np.where(np.isnan(masked), mosaic, np.nan), mosaic])))
        model.train()
        means = np.mean(losses, axis=0).tolist()
        scores = {f"holdout_{part}": value for part, value in zip(model.parts, means) if not np.isnan(value)}
        if folder is None or not isinstance(model, Mae):
            return scores
        folder.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {f"{plane}_{i}": p[plane] for i, p in enumerate(pictures) for plane in p}
        radius = (np.arange(RADIAL_BINS) + 0.5) / RADIAL_BINS * 0.5
        temporary = folder / f"step-{step:08d}.tmp.npz"
        np.savez_compressed(
            temporary,
            cycles_per_voxel=radius,
            power=np.mean(spectra, axis=0),
            rows=self.rows[: len(pictures)],
            ids=self.ids[: len(pictures)],
            **arrays,
        )
        temporary.replace(folder / f"step-{step:08d}.npz")
        return scores

    @torch.no_grad()
    def reconstruction_errors(self, model: Mae, device: torch.device, step: int, path: Path | None) -> dict[str, float]:
        """Mean squared error over masked foreground voxels, in z-score units, of four predictions; to `path`, if given.

        own: the model with the subject's visible tokens. swapped: with another held-out subject's tokens at the same
        places (of the same contrast where there is one; left out when one subject is held out). neighbours: mean of the
        visible ones among the 26 neighbouring patches. average: the average training brain.
        """
        model.eval()
        average = patchify(self._average_brain().to(device), self.reader.patch_zyx)[0]
        table: list[dict[str, float]] = []
        for number, mask_number in itertools.product(range(len(self.rows)), range(MASKS_PER_VOLUME)):
            case = self.case(number, device, mask_number)
            target = model.gather(case.batch, case.masks.masked, torch.float32)
            visible = model.gather(case.batch, case.masks.visible)
            inside = self._foreground(model, case)
            if not bool(inside.any()):
                continue
            predictions = {
                "own": model_prediction(model, visible, case.masks, target),
                "neighbours": neighbour_mean(visible.float(), case.masks, self.reader.grid_zyx),
                "average": average[case.masks.masked[0]][None],
            }
            if (partner := self.other_subject(number)) is not None:
                other = self.case(partner, device)
                tokens = model.gather(other.batch, case.masks.visible)
                predictions["swapped"] = model_prediction(model, tokens, case.masks, target)
            errors = {name: float(((p - target) ** 2)[inside].mean()) for name, p in predictions.items()}
            table.append({"row": int(self.rows[number]), "mask": mask_number, **errors})
        model.train()
        names = [name for name in (table[0] if table else {}) if name not in ("row", "mask")]
        means = {name: float(np.mean([line[name] for line in table])) for name in names}
        if path is None:
            return means
        text = json.dumps({"step": step, "volumes": len(self.rows), "errors": means, "cases": table}, indent=1)
        write_text(path, text)
        return means

    def _foreground(self, model: Mae, case: Case) -> Tensor:
        """(1,Km,P) bool: masked voxels above the scan's foreground threshold, in tokens that hold foreground."""
        store, row = self.reader.store, int(case.batch.row[0])
        at = self.reader.at(row)
        scale, offset, threshold = (store.column(name)[at] for name in ("scale", "offset", "foreground_threshold"))
        values = patchify(case.batch.volumes, self.reader.patch_zyx)[0].double() * scale + offset
        inside = (values > threshold) & (case.batch.foreground[0] > 0)[:, None]
        return inside[case.masks.masked[0]][None]

    def _average_brain(self) -> Tensor:
        """(1,1,Z,Y,X) mean of clipped, z-scored training volumes."""
        count = min(AVERAGE_BRAIN_VOLUMES, len(self.train_rows))
        chosen = self.train_rows[np.linspace(0, len(self.train_rows) - 1, count).round().astype(int)]
        total = torch.zeros(1, 1, *self.reader.volume_zyx)
        for row in chosen:
            b = read_batch(self.reader, [Draw(0, int(row), self.reader.centre(), False)])
            total += (b.volumes.float() * b.scale + b.offset).clamp(float(b.low), float(b.high))
        return total / count


def model_prediction(model: Mae, visible: Tensor, masks: Masks, target: Tensor) -> Tensor:
    """Masked patches (1,Km,P) in z-score units. With per-patch targets the true patch's mean and deviation are lent to
    the prediction, as the objective does for its spectral term."""
    prediction = model.predict(visible, masks)
    if model.config.mae.normalize_target:
        mean, std = patch_deviation(target)
        return prediction * std + mean
    return prediction


def volumes(model: Mae, case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(true, mosaic, masked) volumes (Z,Y,X) in z-score units; masked voxels of the last are NaN."""
    visible = model.gather(case.batch, case.masks.visible, torch.float32)
    target = model.gather(case.batch, case.masks.masked, torch.float32)
    prediction = model_prediction(model, visible.to(model.dtype), case.masks, target)
    parts = (target, prediction, torch.full_like(target, float("nan")))
    patch = model.config.model.patch_voxels_zyx
    true, mosaic, masked = (
        assemble(visible, p, case.masks, model.volume_zyx, patch)[0, 0].cpu().numpy() for p in parts
    )
    return true, mosaic, masked


def neighbour_mean(visible_BKP: Tensor, masks: Masks, grid_zyx: Zyx) -> Tensor:
    """Each masked patch (B,Km,P) as the mean of the visible ones among its 26 neighbours, voxel by voxel; where none is
    visible, the mean of all visible voxels of the volume."""
    b, _, p = visible_BKP.shape
    tokens = int(np.prod(grid_zyx))
    ids = masks.visible[..., None]
    values = visible_BKP.new_zeros(b, tokens, p).scatter(1, ids.expand_as(visible_BKP), visible_BKP)
    seen = visible_BKP.new_zeros(b, tokens, 1).scatter(1, ids, 1.0)
    total, count = (27 * F.avg_pool3d(F.pad(unpatchify_channels(t, grid_zyx), (1,) * 6), 3, 1) for t in (values, seen))
    mean = torch.where(count > 0.5, total / count.clamp(min=0.5), visible_BKP.mean(dim=(1, 2)).view(b, 1, 1, 1, 1))
    return mean.flatten(2).transpose(1, 2).gather(1, masks.masked[..., None].expand(-1, -1, p))


def unpatchify_channels(tokens_BNP: Tensor, grid_zyx: Zyx) -> Tensor:
    """(B,N,P) → (B,P,GZ,GY,GX): patches as channels of the token grid."""
    return tokens_BNP.transpose(1, 2).reshape(tokens_BNP.shape[0], -1, *grid_zyx)


def radial_power(volume_zyx: np.ndarray) -> np.ndarray:
    """(RADIAL_BINS,) mean |F|² of the orthonormal 3D FFT in shells of equal width up to 0.5 cycles per voxel."""
    power = np.abs(np.fft.fftn(volume_zyx, norm="ortho")) ** 2
    axes = np.meshgrid(*(np.fft.fftfreq(n) for n in volume_zyx.shape), indexing="ij")
    shell = (np.sqrt(sum(axis**2 for axis in axes)) * 2 * RADIAL_BINS).astype(int)
    inside = shell < RADIAL_BINS
    total, count = np.bincount(shell[inside], power[inside], RADIAL_BINS), np.bincount(shell[inside], None, RADIAL_BINS)
    return total / np.maximum(count, 1)


def planes(volumes_nzyx: np.ndarray) -> dict[str, np.ndarray]:
    """Middle slices (n,rows,columns) float16 of stacked volumes (n,Z,Y,X), upright: superior or anterior at the
    top, x increasing to the right."""
    _, z, y, x = volumes_nzyx.shape
    slices = {
        "axial": volumes_nzyx[:, z // 2],
        "coronal": volumes_nzyx[:, :, y // 2],
        "sagittal": volumes_nzyx[:, :, :, x // 2],
    }
    return {name: s[:, ::-1].astype(np.float16) for name, s in slices.items()}
