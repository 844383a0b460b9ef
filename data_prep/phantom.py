"""Synthetic brain cohorts as BIDS datasets: a real template's anatomy, known differences, no download.

The anatomy is the symmetric ICBM152 2009a template (Fonov et al. 2011, NeuroImage 54:313) as nilearn ships it. What
makes subjects differ is in `anatomy`; here are the scanners (grids, bias fields, noise, units) and the files.
"""

import csv
import io
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from nilearn.datasets import (
    load_mni152_brain_mask,
    load_mni152_gm_template,
    load_mni152_template,
    load_mni152_wm_template,
)
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from scipy.ndimage import gaussian_filter1d, map_coordinates
from scipy.spatial.transform import Rotation

from brainscale import __version__
from brainscale.geometry import mm_to_voxel, spacing_mm, voxel_to_mm
from brainscale.settings import InputError
from brainscale_data_prep import anatomy, nifti
from brainscale_data_prep.anatomy import CONTRASTS, Subject, Template


class Site(NamedTuple):
    """What a scanner adds: noise (share of white matter), bias field (spread of its logarithm) and units."""

    noise_fraction: float
    bias_std: float
    gain: float


SITES = {"north": Site(0.02, 0.04, 350.0), "harbour": Site(0.03, 0.06, 900.0), "valley": Site(0.04, 0.08, 600.0)}
SPACINGS_MM = ((1.0, 1.0, 1.0), (0.9, 0.9, 1.2), (1.2, 1.2, 1.2), (1.5, 1.5, 1.5), (2.0, 1.0, 1.0), (1.0, 1.0, 3.0))
ORIENTATIONS = ("RAS", "LAS", "LPI", "LPS", "PSR", "ASL", "LSA", "RIP")
DIRECTIONS = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
OBLIQUE_FRACTION, OBLIQUE_DEGREES = 0.3, 3.0
SLOPE_FRACTION, SLOPES = 0.25, (0.25, 0.5, 2.0)
BRAIN_BOX_MM = ((-77, -112, -76), (77, 80, 88))
HEAD_BOX_MM = ((-98, -134, -172), (98, 114, 116))
"""Lower and upper corners of the template's grid; lengths are even, so that 2 mm voxels fill it."""
LOWEST_NECK_MM = -85.0
"""Fields of view of heads end 12 to 18 mm below this."""


def load_template(step_mm: int, head: bool) -> Template:
    """The template on 1 or 2 mm voxels; with `head`, inside a synthetic skull, scalp, face and neck."""
    loads = (load_mni152_brain_mask, load_mni152_gm_template, load_mni152_wm_template, load_mni152_template)
    images = [load(resolution=1) for load in loads]
    room = ((0, 0), (0, 16), (100, 0)) if head else ((0, 0), (0, 0), (4, 0))
    maps = np.stack([np.pad(image.get_fdata(dtype=np.float32), room) for image in images])
    first_mm = images[0].affine[:3, 3] - [below for below, _ in room]
    low_mm, high_mm = HEAD_BOX_MM if head else BRAIN_BOX_MM
    (x0, y0, z0), (x1, y1, z1) = (np.rint(corner - first_mm).astype(int) for corner in (low_mm, high_mm))
    maps = maps[:, x0:x1, y0:y1, z0:z1]
    s = step_mm
    x, y, z = (n // s for n in maps.shape[1:])
    maps = maps.reshape(4, x, s, y, s, z, s).mean(axis=(2, 4, 6))
    affine = np.diag([s, s, s, 1.0])
    affine[:3, 3] = np.array(low_mm) + (s - 1) / 2

    inside = maps[0] > 0.5
    grey, white, t1 = maps[1:, inside]
    csf = np.clip(1 - grey - white, 0, 1)
    tissues = np.stack([csf, grey, white], axis=1)
    exact = tissues.astype(float)
    # rounded, since the last bits of a large product depend on the number of threads
    weights = np.linalg.solve(exact.T @ exact, exact.T @ t1).round(6).astype(np.float32)
    texture = t1 - (csf * weights[0] + grey * weights[1] + white * weights[2])
    axes_mm = [affine[k, 3] + s * np.arange(n) for k, n in enumerate((x, y, z))]
    around = anatomy.head_around(inside, axes_mm) if head else np.full((x, y, z), -1, np.int8)
    brain_xyz, head_xyz = (np.stack(np.nonzero(where)).astype(np.int16) for where in (inside, around >= 0))
    return Template(s, affine, (x, y, z), brain_xyz, csf, grey, white, texture, head_xyz, around[tuple(head_xyz)])


def draw_grid(
    rng: np.random.Generator, template: Template, subject: Subject, spacing: float | None
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Affine (4,4) to the subject's world and shape (x,y,z) of a scan that holds the whole subject.

    Orientation, obliqueness, margins and, unless `spacing` (mm, isotropic) is given, the resolution are random.
    """
    mm = np.array(SPACINGS_MM[rng.integers(len(SPACINGS_MM))] if spacing is None else (spacing,) * 3)
    letters = ORIENTATIONS[rng.integers(len(ORIENTATIONS))]
    axes = np.array([DIRECTIONS[letter] for letter in letters], dtype=float).T
    if rng.random() < OBLIQUE_FRACTION:
        tilt = OBLIQUE_DEGREES * anatomy.bounded_normal(rng, 3)
        axes = Rotation.from_rotvec(tilt, degrees=True).as_matrix() @ axes
    tissue_xyz = np.concatenate([template.brain_xyz[:, ::97], template.head_xyz[:, ::97]], axis=1)
    tissue_mm = voxel_to_mm(template.affine, tissue_xyz.T)
    tissue_mm = mm_to_voxel(subject.to_template, tissue_mm[tissue_mm[:, 2] > LOWEST_NECK_MM]) @ axes
    margin_mm = rng.uniform(12, 18, size=(2, 3))
    low, high = tissue_mm.min(axis=0) - margin_mm[0], tissue_mm.max(axis=0) + margin_mm[1]
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes * mm, axes @ low
    x, y, z = (np.ceil((high - low) / mm).astype(int) + 1).tolist()
    return affine, (x, y, z)


def sample(
    image: np.ndarray, template: Template, subject: Subject, affine: np.ndarray, shape_xyz: tuple[int, int, int]
) -> np.ndarray:
    """A painted image on a scan's grid, (x,y,z) float32: blurred to the voxel size, then read through the warp."""
    spacings = spacing_mm(affine)
    for axis, across in enumerate(np.abs(affine[:3, :3] / spacings).argmax(axis=1)):
        # Gaussian profiles whose full width at half maximum (2.355 standard deviations) is the voxel size
        variance = (spacings[across] ** 2 - template.step_mm**2) / (2.355 * template.step_mm) ** 2
        if variance > 0.05:
            image = gaussian_filter1d(image, np.sqrt(variance), axis=axis, truncate=3)
    strides = np.maximum(1, np.rint(4 / spacings)).astype(int)
    knots = np.meshgrid(*(np.arange(0, n - 1 + s, s) for n, s in zip(shape_xyz, strides)), indexing="ij")
    template_mm = anatomy.world_to_template(subject, voxel_to_mm(affine, np.stack(knots, axis=-1)))
    voxels = np.moveaxis(mm_to_voxel(template.affine, template_mm), -1, 0).astype(np.float32)
    coordinates = anatomy.interpolate(voxels, [np.arange(n) / s for n, s in zip(shape_xyz, strides)])
    return map_coordinates(image, coordinates, order=1)


def bias_field(rng: np.random.Generator, std: float, shape_xyz: tuple[int, int, int]) -> np.ndarray:
    """A smooth multiplicative field (x,y,z): the exponential of a quadratic whose coefficients have spread `std`."""
    knots = np.linspace(-1, 1, 17, dtype=np.float32)
    x, y, z = knots[:, None, None], knots[:, None], knots
    terms = (x, y, z, x * y, y * z, x * z, x * x, y * y, z * z)
    log_field = np.zeros((17, 17, 17), np.float32)
    for coefficient, term in zip(std * rng.standard_normal(9), terms):
        log_field += np.float32(coefficient) * term
    return np.exp(anatomy.interpolate(log_field, [np.linspace(0, 16, n) for n in shape_xyz]))


def scan(
    template: Template, subject: Subject, contrast: str, seed: int, spacing: float | None
) -> tuple[np.ndarray, np.ndarray, float]:
    """Stored voxels (x,y,z) int16, affine (4,4) and scl_slope of one scan: value = stored × slope.

    Noise is Rician, the magnitude of a complex signal (Gudbjartsson and Patz 1995, Magn. Reson. Med. 34:910). Outside a
    brain without a head the values are 0, as skull stripping leaves them.
    """
    rng = anatomy.stream(seed, 2, subject.number, CONTRASTS.index(contrast))
    site = SITES[subject.site]
    affine, shape = draw_grid(rng, template, subject, spacing)
    signal = sample(anatomy.paint(template, subject, contrast), template, subject, affine, shape)
    measured = np.ones(shape, bool) if template.head_xyz.size else signal > anatomy.DARKEST_BRAIN / 2
    signal = (signal * bias_field(rng, site.bias_std, shape))[measured]
    noise = rng.standard_normal((2, signal.size), dtype=np.float32) * np.float32(site.noise_fraction)
    slope = float(rng.choice(SLOPES)) if rng.random() < SLOPE_FRACTION else 1.0
    codes = np.rint(np.hypot(signal + noise[0], noise[1]) * np.float32(site.gain * rng.uniform(0.8, 1.25) / slope))
    assert codes.max() < 2**15
    stored = np.zeros(shape, np.int16)
    stored[measured] = codes
    return stored, affine, slope


def make(
    dest: Path,
    subjects: int,
    seed: int,
    head: bool = False,
    spacing_mm: float | None = None,
    contrasts: Sequence[str] = ("T1w",),
    workers: int | None = None,
) -> None:
    """Write a BIDS dataset of synthetic brains to `dest`, one scan of every contrast per subject.

    The same arguments give the same bytes, whatever `workers` (threads; none: one per core, at most 4); a larger cohort
    begins with the same subjects. `spacing_mm`: isotropic voxel size, by default it varies. Raises InputError where
    `dest` exists and is not an empty folder, and for arguments out of range. dataset_description.json is written last.
    """
    dest = Path(dest)
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise InputError(f"{dest} is not an empty folder; give a path that does not exist yet, or remove it first")
    if not 1 <= subjects <= 1_000_000:
        raise InputError(f"subjects = {subjects}: give a number from 1 to 1000000")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed = {seed}: give a whole number from 0 to {2**32 - 1}")
    if spacing_mm is not None and not 0.5 <= spacing_mm <= 8:
        raise InputError(f"spacing_mm = {spacing_mm}: give a voxel size from 0.5 to 8 mm")
    if not contrasts or len(set(contrasts)) != len(contrasts) or not set(contrasts) <= set(CONTRASTS):
        raise InputError(f"contrasts = {','.join(contrasts)!r}: give each at most once, from {', '.join(CONTRASTS)}")
    template = load_template(2 if spacing_mm is not None and spacing_mm >= 2 else 1, head)

    def write(number: int) -> dict[str, Any]:
        subject = anatomy.draw_subject(seed, number, tuple(SITES))
        folder = dest / _label(number) / "anat"
        folder.mkdir(parents=True)
        for contrast in contrasts:
            nifti.write(
                folder / f"{_label(number)}_{contrast}.nii.gz", *scan(template, subject, contrast, seed, spacing_mm)
            )
        return _row(subject)

    rows = []
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    threads = workers or min(4, os.cpu_count() or 1)
    with (
        Progress(*columns, console=console, disable=not console.is_terminal) as bar,
        ThreadPoolExecutor(threads) as pool,
    ):
        task = bar.add_task("phantom subjects", total=subjects)
        for row in pool.map(write, range(1, subjects + 1)):
            rows.append(row)
            bar.advance(task)
            if not console.is_terminal and len(rows) * 10 // subjects > (len(rows) - 1) * 10 // subjects:
                print(f"phantom: {len(rows)}/{subjects} subjects", flush=True)
    _describe(dest, rows, head)


def _label(number: int) -> str:
    return f"sub-{number:03d}"


def _row(subject: Subject) -> dict[str, Any]:
    names = ("age", "sex", "site", "label_atrophy", "label_lesion")
    return {"participant_id": _label(subject.number)} | {name: getattr(subject, name) for name in names}


def _describe(dest: Path, rows: list[dict[str, Any]], head: bool) -> None:
    """The files at the root of the dataset; the description that makes it one comes last."""
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0], delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files = {
        "participants.tsv": table.getvalue(),
        "participants.json": json.dumps(_columns(), indent=2) + "\n",
        "README": README + (HEAD_README if head else ""),
        "dataset_description.json": json.dumps(
            {
                "Name": "Synthetic brains on ICBM152 anatomy",
                "BIDSVersion": "1.10.0",
                "DatasetType": "raw",
                "GeneratedBy": [{"Name": "brainscale phantom", "Version": __version__}],
            },
            indent=2,
        )
        + "\n",
    }
    for name, text in files.items():
        (dest / name).write_text(text, encoding="utf-8")


README = """\
Synthetic brain MRI. No scan of a person is in here: every volume is a deformed, re-painted copy of the symmetric
ICBM152 2009a average template (Fonov et al. 2011, NeuroImage 54:313), with simulated contrast, bias field and noise.
participants.json says which anatomical change belongs to which column, in MNI millimetres.

The template is Copyright (C) 1993-2009 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological Institute,
McGill University. Permission to use, copy, modify, and distribute it for any purpose and without fee is granted
provided that this notice appears in all copies. It comes "as is", without express or implied warranty.
"""
HEAD_README = """
Skull, scalp, face and neck are simple synthetic shapes around the brain, not anatomy.
"""


def _columns() -> dict[str, Any]:
    """participants.json: every column and the anatomical change behind it, places in MNI mm."""
    (x, y, z), spread_mm = anatomy.HIPPOCAMPUS_MM
    growth = "grows outwards from the centre, more with age and with label_atrophy (ventricles)"
    loss = "grey matter gives way to cerebrospinal fluid, more with age and with label_atrophy (both hippocampi)"
    atrophy = [
        {"Effect": growth, "CentreMm": [anatomy.VENTRICLES_MM[0]], "StandardDeviationMm": anatomy.VENTRICLES_MM[1]},
        {"Effect": loss, "CentreMm": [(-x, y, z), (x, y, z)], "StandardDeviationMm": spread_mm},
    ]
    sphere = "white-matter sphere, dark in T1w, bright in T2w, FLAIR and PDw"
    lesion = [{"Effect": sphere, "CentreMm": [anatomy.LESION_MM], "RadiusMm": anatomy.LESION_RADIUS_MM}]
    side = (
        f"brightness times 1 + {anatomy.RIGHT_GAIN_FRACTION} tanh(x / {anatomy.MIDLINE_MM} mm), x positive rightwards"
    )
    asymmetry: list[dict[str, Any]] = [{"Effect": side}]
    for pole_mm, shift_mm in anatomy.PETALIA_MM:
        effect = f"shift by {shift_mm} mm along y, positive forwards"
        asymmetry += [{"Effect": effect, "CentreMm": [pole_mm], "StandardDeviationMm": anatomy.PETALIA_STD_MM}]
    scanners = {
        name: f"noise {site.noise_fraction} of white matter, log bias {site.bias_std}, white matter about {site.gain}"
        for name, site in SITES.items()
    }
    levels = {"0": "absent", "1": "present"}
    return {
        "participant_id": {"Description": "Subject; all share one asymmetry", "Anatomy": asymmetry},
        "age": {"Description": "Age, uniform, independent of the labels", "Units": "year", "Anatomy": atrophy},
        "sex": {"Description": "Sex; M brains are 5 % longer on average", "Levels": {"F": "female", "M": "male"}},
        "site": {"Description": "Scanner; changes no anatomy", "Levels": scanners},
        "label_atrophy": {"Description": "Simulated atrophy", "Levels": levels, "Anatomy": atrophy},
        "label_lesion": {"Description": "Simulated lesion", "Levels": levels, "Anatomy": lesion},
    }
