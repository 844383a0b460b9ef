"""How fine or coarse each planted effect is, and what it looks like: radial power spectra, and pictures of a subject.

An effect is the noise-free difference between a subject at one severity and the same subject at another, everything
else alike, on the template's grid. Its energy per shell of |k| is summed over a few subjects; the centroid is the mean
frequency by energy. Frequencies are cycles per mm, at most ½ / spacing: finer ones exist in the corners of the cube
alone and are left out.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from brainscale_data_prep import cohort_files, scanners
from brainscale_data_prep.anatomy import Subject, Template, draw_subject, paint
from brainscale_data_prep.severity import ORACLE_AUROC, SEPARATION, TASKS

SUBJECTS, BINS = 2, 24
HEALTHY, ILL = -SEPARATION / 2, SEPARATION / 2 + 1
"""Severities of the pictures: typical with label 0; one standard deviation above typical with label 1."""
DIFFERENCE_LIMIT, BRIGHTEST = 0.3, 1.2


class Spectrum(NamedTuple):
    """Energy of a difference by radial frequency."""

    frequencies_per_mm: np.ndarray
    """(BINS,) middles of the shells."""
    shares: np.ndarray
    """(BINS,) of the energy up to the highest frequency; they add up to 1."""
    centroid_per_mm: float


def radial_spectrum(differences: Sequence[np.ndarray], spacing_mm: Sequence[float]) -> Spectrum:
    """Of differences (x,y,z) of voxels `spacing_mm`, summed. Raises ValueError where they are all 0."""
    highest = 0.5 / max(spacing_mm)
    energy, weighted = np.zeros(BINS), 0.0
    for difference in differences:
        x, y, z = difference.shape
        along = [np.fft.fftfreq(n, mm) for n, mm in zip((x, y), spacing_mm)] + [np.fft.rfftfreq(z, spacing_mm[2])]
        radius = np.sqrt(sum(np.square(k) for k in np.meshgrid(*along, indexing="ij", sparse=True)))
        power = np.abs(np.fft.rfftn(difference)) ** 2
        power[..., 1 : (z + 1) // 2] *= 2  # the half that a real volume's spectrum repeats
        kept = radius < highest
        shells = (radius[kept] * (BINS / highest)).astype(int)
        energy += np.bincount(shells, power[kept], BINS)
        weighted += float(power[kept] @ radius[kept])
    total = energy.sum()
    if not total > 0:
        raise ValueError("there is no difference whose spectrum could be taken")
    return Spectrum((np.arange(BINS) + 0.5) * highest / BINS, energy / total, weighted / float(total))


def noise_free(template: Template, subject: Subject, contrast: str) -> np.ndarray:
    """(x,y,z) of a subject on the template's grid, without scanner: white matter of T1w is 1."""
    return scanners.sample(paint(template, subject, contrast), template, subject, template.affine, template.shape_xyz)


def everywhere(subject: Subject, severity: float) -> Subject:
    """The same person with one severity of all tasks."""
    for task in TASKS:
        subject = subject.at(task, severity)
    return subject


def spectra(template: Template, seed: int, contrast: str, subjects: int = SUBJECTS) -> dict[str, Spectrum]:
    """Task → spectrum of what one standard deviation adds to severity 0, over the first subjects of a cohort."""
    found: dict[str, list[np.ndarray]] = {task: [] for task in TASKS}
    for number in range(1, subjects + 1):
        subject = everywhere(draw_subject(seed, number, tuple(scanners.SITES)), 0.0)
        base = noise_free(template, subject, contrast)
        for task in TASKS:
            found[task].append(noise_free(template, subject.at(task, 1.0), contrast) - base)
    return {task: radial_spectrum(differences, (float(template.step_mm),) * 3) for task, differences in found.items()}


def write(dest: Path, template: Template, seed: int, contrasts: Sequence[str], truth: dict[str, Any]) -> None:
    """effects.json and effects.png of a cohort: oracle, spectra per contrast, and the same subject healthy and ill.

    truth: content of truth.json.
    """
    found = {contrast: spectra(template, seed, contrast) for contrast in contrasts}
    places = cohort_files.places_of_effects()
    about = {
        "SpectrumOf": f"severity +1 minus severity 0, noise-free, {template.step_mm} mm, sum over {SUBJECTS} subjects",
        "Tasks": {
            task: {
                "OracleAuroc": ORACLE_AUROC,
                "CohortAuroc": truth[f"severity_{task}"]["CohortAuroc"],
                "Anatomy": places[task],
                "Spectrum": {contrast: _numbers(by_task[task]) for contrast, by_task in found.items()},
            }
            for task in TASKS
        },
    }
    cohort_files.write_json(dest / "effects.json", about)
    subject = everywhere(draw_subject(seed, 1, tuple(scanners.SITES)), HEALTHY)
    contrast = contrasts[0]
    picture(template, subject, contrast, found[contrast]).savefig(
        dest / "effects.png", dpi=110, metadata={"Software": None}
    )


def _numbers(spectrum: Spectrum) -> dict[str, Any]:
    return {
        "CentroidPerMm": round(spectrum.centroid_per_mm, 4),
        "FrequencyPerMm": [round(float(k), 4) for k in spectrum.frequencies_per_mm],
        "EnergyShare": [round(float(share), 5) for share in spectrum.shares],
    }


def picture(template: Template, subject: Subject, contrast: str, by_task: dict[str, Spectrum]) -> Figure:
    """A row per task: the slice that changes most, healthy, ill and their difference; beside them the spectra."""
    figure = Figure(figsize=(12, 2.6 * len(TASKS)), layout="constrained")
    parts: Any = figure.subfigures(1, 2, width_ratios=(1.5, 1))
    pictures, chart = parts
    axes = pictures.subplots(len(TASKS), 3)
    healthy = noise_free(template, subject, contrast)
    for row, task in zip(axes, TASKS):
        ill = noise_free(template, subject.at(task, ILL), contrast)
        level = int(((ill - healthy) ** 2).sum(axis=(0, 1)).argmax())
        for place, volume in zip(row, (healthy, ill, ill - healthy)):
            look = {"cmap": "gray", "vmin": 0, "vmax": BRIGHTEST}
            if place is row[2]:
                look = {"cmap": "RdBu_r", "vmin": -DIFFERENCE_LIMIT, "vmax": DIFFERENCE_LIMIT}
            place.imshow(volume[:, :, level].T, origin="lower", **look)
            place.set_xticks([])
            place.set_yticks([])
        row[0].set_ylabel(task)
    for place, title in zip(axes[0], (f"severity {HEALTHY:.1f}", f"severity {ILL:+.1f}", "difference")):
        place.set_title(title)
    panel = chart.subplots()
    for task, spectrum in by_task.items():
        label = f"{task}, centroid {spectrum.centroid_per_mm:.3f}"
        panel.plot(spectrum.frequencies_per_mm, spectrum.shares, label=label)
    panel.set_yscale("log")
    panel.set_ylim(bottom=1e-5)
    panel.set_xlabel("radial frequency, cycles per mm")
    panel.set_ylabel(f"share of the effect's energy, {contrast}")
    panel.legend(frameon=False)
    panel.grid(alpha=0.2)
    return figure
