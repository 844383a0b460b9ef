"""The commands that make data whose truth is known: phantom, plant."""

import os
from pathlib import Path


def phantom(
    dest: Path,
    /,
    *,
    subjects: int = 24,
    seed: int = 0,
    contrasts: str = "T1w",
    spacing_mm: float | None = None,
    head: bool = False,
    confound: str = "",
    report: bool = False,
) -> None:
    """Write a BIDS dataset of synthetic brains: deformed ICBM152 anatomy, five diseases with known effect sizes.

    The labels are label_atrophy, label_lesions, label_sharpness, label_mass and label_distributed; truth.tsv holds the
    severity behind each, whose AUROC no classifier can beat on average.

    Example: brainscale phantom data/phantom --subjects 24 --seed 0 --contrasts T1w,FLAIR

    Example: brainscale phantom data/confounded --subjects 80 --confound label_mass=0.8

    Parameters
    ----------
    dest
        Folder to make; must be absent or empty.
    subjects
        Number of subjects, one session each.
    seed
        The same seed gives the same bytes; a larger cohort begins with the same subjects.
    contrasts
        Comma-separated BIDS suffixes among T1w, T2w, FLAIR, PDw; every subject gets one scan of each.
    spacing_mm
        Isotropic voxel size; by default it varies from scan to scan.
    head
        Add skull, scalp and neck around the brain.
    confound
        LABEL=STRENGTH: this share (0 to 1) of subjects is scanned at a site that follows the label.
    report
        Also write effects.json and effects.png: each effect's radial power spectrum, and what it looks like.
    """
    from brainscale_data_prep.phantom import make

    wanted = tuple(contrasts.split(","))
    make(dest, subjects, seed, head, spacing_mm, wanted, confound=confound, report=report)


def plant(source: Path, dest: Path, /, *, seed: int = 0, all_t1w: bool = False, workers: int | None = None) -> None:
    """Plant small lesions and a change of cortical sharpness into the T1w scans of real people: a BIDS copy with the
    labels label_lesions and label_sharpness, whose effect sizes are known. Results on it are on planted effects.

    Example: brainscale plant data/bids data/planted --seed 0

    Parameters
    ----------
    source
        A BIDS dataset or any folder of NIfTI files; it is only read. Scans are skull-stripped or have brain masks.
    dest
        Folder to make; must be absent or empty, and outside the source.
    seed
        The same source and seed give the same bytes.
    all_t1w
        In a folder without BIDS names: take every scan for T1w, whatever it is called.
    workers
        Threads; default: one per core that this process may use, at most 4.
    """
    from brainscale_data_prep.planted_dataset import plant as plant_into

    threads = min(4, len(os.sched_getaffinity(0))) if workers is None else workers
    summary = plant_into(source, dest, seed, all_t1w, threads)
    left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(summary.left_out.items()))
    print(f"{dest}: planted into {summary.scans} scans of {summary.subjects} subjects; left out: {left_out or 'none'}")
