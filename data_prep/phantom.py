"""Synthetic brain cohorts as BIDS datasets: a real template's anatomy, known differences, no download.

The anatomy is the symmetric ICBM152 2009a template (Fonov et al. 2011, NeuroImage 54:313) as nilearn ships it. What
makes subjects differ is in `anatomy` and `effects`, who is how ill in `severity`, how it is measured in `scanners`.
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from nilearn.datasets import (
    load_mni152_brain_mask,
    load_mni152_gm_template,
    load_mni152_template,
    load_mni152_wm_template,
)
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from scipy.ndimage import gaussian_filter

from brainscale.settings import InputError
from brainscale_data_prep import anatomy, cohort_files, effect_report, effects, nifti
from brainscale_data_prep.anatomy import CONTRASTS, Template
from brainscale_data_prep.cohort_files import Person
from brainscale_data_prep.scanners import SITES, scan
from brainscale_data_prep.severity import parse_confound

BRAIN_BOX_MM = ((-77, -112, -76), (77, 80, 88))
HEAD_BOX_MM = ((-98, -134, -172), (98, 114, 116))
"""Lower and upper corners of the template's grid; lengths are even, so that 2 mm voxels fill it."""


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
    volume = np.zeros((x, y, z), np.float32)
    volume[inside] = csf
    near_csf = gaussian_filter(volume, effects.WIDENING_MM / s)[inside]
    around = anatomy.head_around(inside, axes_mm) if head else np.full((x, y, z), -1, np.int8)
    brain_xyz, head_xyz = (np.stack(np.nonzero(where)).astype(np.int16) for where in (inside, around >= 0))
    return Template(
        s, affine, (x, y, z), brain_xyz, csf, grey, white, texture, near_csf, head_xyz, around[tuple(head_xyz)]
    )


def make(
    dest: Path,
    subjects: int,
    seed: int,
    head: bool = False,
    spacing_mm: float | None = None,
    contrasts: Sequence[str] = ("T1w",),
    workers: int | None = None,
    confound: str = "",
    report: bool = False,
) -> None:
    """Write a BIDS dataset of synthetic brains to `dest`, one scan of every contrast per subject.

    The same arguments give the same bytes, whatever `workers` (threads; none: one per core, at most 4); a larger cohort
    begins with the same subjects. `spacing_mm`: isotropic voxel size, by default it varies. `confound`: "label_NAME=S",
    the share S of subjects whose site follows that label. `report`: effects.json and effects.png too. Raises InputError
    where `dest` exists and is not an empty folder, and for arguments out of range. dataset_description.json comes last.
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
    follows = parse_confound(confound) if confound else None
    template = load_template(2 if spacing_mm is not None and spacing_mm >= 2 else 1, head)

    def write(number: int) -> Person:
        subject = anatomy.draw_subject(seed, number, tuple(SITES), follows)
        name = cohort_files.label_of(number)
        folder = dest / name / "anat"
        folder.mkdir(parents=True)
        for contrast in contrasts:
            nifti.write(folder / f"{name}_{contrast}.nii.gz", *scan(template, subject, contrast, seed, spacing_mm))
        row = {"participant_id": name, "age": subject.age, "sex": subject.sex, "site": subject.site}
        return Person(row, subject.labels, subject.severities)

    people: list[Person] = []
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    threads = workers or min(4, os.cpu_count() or 1)
    with (
        Progress(*columns, console=console, disable=not console.is_terminal) as bar,
        ThreadPoolExecutor(threads) as pool,
    ):
        task = bar.add_task("phantom subjects", total=subjects)
        for person in pool.map(write, range(1, subjects + 1)):
            people.append(person)
            bar.advance(task)
            if not console.is_terminal and len(people) * 10 // subjects > (len(people) - 1) * 10 // subjects:
                print(f"phantom: {len(people)}/{subjects} subjects", flush=True)
    cohort_files.write_people(dest, people, cohort_files.columns(follows))
    if report:
        effect_report.write(dest, template, seed, contrasts, json.loads((dest / "truth.json").read_text()))
    readme = cohort_files.README + (cohort_files.HEAD_README if head else "")
    (dest / "README").write_text(readme, encoding="utf-8")
    cohort_files.write_description(dest, "Synthetic brains on ICBM152 anatomy", "brainscale phantom")
