"""A BIDS copy of the T1w scans of real people with planted effects: labels, truth, and what was done to which scan.

The source is only read. Taken: T1w scans, their .json files, the brain masks used, and participants.tsv.
"""

import json
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from brainscale.geometry import spacing_mm
from brainscale.settings import InputError
from brainscale_data_prep import bids, cohort_files, discover, effect_report, nifti, planting, tables, tree
from brainscale_data_prep.cohort_files import Person
from brainscale_data_prep.discover import ScanFile
from brainscale_data_prep.effects import LESION_RADIUS_MM, MOST_LESIONS
from brainscale_data_prep.nifti import Refused
from brainscale_data_prep.nifti_copy import copy_with_voxels
from brainscale_data_prep.planting import PLANTED
from brainscale_data_prep.severity import draw_labels, draw_severities, stream

SPECTRA_OF = 3
STATEMENT = "Planted by brainscale into a real scan; no disease of a person. Results are results on planted effects."
README = """\
T1w scans of real people with planted effects: small dark lesions in the white matter (label_lesions) and a sharper or
more blurred grey/white boundary of the cortex (label_sharpness). Neither says anything about the health of these
people, and a result on these labels is a result on planted effects.

Everybody has some of each: a label says from which of two overlapping distributions the severity comes (truth.tsv,
truth.json). planted.tsv says how much of each scan was changed and, for the first scans, how fine each effect is: the
mean frequency of the energy of severity 1 less severity 0. Every other voxel, and every header, is as it was. The
licence is that of the source.
"""


@dataclass
class Summary:
    """What `plant` did."""

    scans: int
    subjects: int
    left_out: dict[str, int] = field(default_factory=dict)
    """Reason → scans."""


def plant(source: Path, dest: Path, seed: int, all_t1w: bool = False, workers: int = 1) -> Summary:
    """Plant into every T1w scan of `source` (BIDS, or any folder) and write the BIDS dataset `dest`.

    all_t1w: in a folder without BIDS names every scan is taken for T1w. Subjects get labels and severities by their
    order, so the same source and seed give the same bytes for any `workers` (threads). Raises InputError where `dest`
    is not an empty folder outside the source, and where no scan can be taken.
    """
    if not source.is_dir():
        raise InputError(f"{source} is no folder; give the folder that holds the scans")
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise InputError(f"{dest} is not an empty folder; give a path that does not exist yet, or remove it first")
    if dest.resolve().is_relative_to(source.resolve()):
        raise InputError(f"{dest} lies in {source}, where it would be found as a scan of it; give a folder outside it")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed = {seed}: give a whole number from 0 to {2**32 - 1}")
    is_bids = bids.is_dataset(source)
    scans = discover.find(source, None if all_t1w and not is_bids else ("T1w",)).scans
    subjects = sorted({scan.subject for scan in scans if not scan.code})
    people = {}
    for number, subject in enumerate(subjects, start=1):
        labels = draw_labels(seed, number, PLANTED)
        people[subject] = Person({}, labels, draw_severities(seed, number, labels)[0])
    names = _names(scans, is_bids)

    def do(place: int) -> tuple[dict[str, Any], str]:
        scan = scans[place]
        if scan.code:
            return {}, scan.code
        try:
            return _plant(scan, dest / names[place], people[scan.subject], stream(seed, 7, place, 0), place), ""
        except Refused as refused:
            return {}, refused.code

    with ThreadPoolExecutor(workers) as pool:
        done = list(pool.map(do, range(len(scans))))
    rows = [{"scan": name} | row for name, (row, code) in zip(names, done) if not code]
    left_out = dict(Counter(code for _, code in done if code))
    if not rows:
        raise InputError(f"none of the {len(scans)} scans of {source} can be planted into ({left_out}); see the README")
    taken = [scan for scan, (_, code) in zip(scans, done) if not code]
    _write_tables(source, dest, taken, people, rows, is_bids)
    return Summary(len(rows), len({scan.subject for scan in taken}), left_out)


def _names(scans: Sequence[ScanFile], is_bids: bool) -> list[str]:
    """Where each scan goes, relative to the new dataset: where it was, or a BIDS name of its subject with run-N."""
    if is_bids:
        return [scan.source for scan in scans]
    counts: defaultdict[str, int] = defaultdict(int)
    owners: dict[str, str] = {}
    names = []
    for scan in scans:
        subject = participant(scan)
        if owners.setdefault(subject, scan.subject) != scan.subject:
            raise InputError(f"{owners[subject]} and {scan.subject} would both become {subject}; rename one of them")
        counts[subject] += 1
        suffix = ".nii.gz" if tree.split(scan.source)[1].lower().endswith(".gz") else ".nii"
        names.append(f"{subject}/anat/{subject}_run-{counts[subject]}_T1w{suffix}")
    return names


def participant(scan: ScanFile) -> str:
    """participant_id of a scan's subject: sub- and its letters and digits."""
    label = re.sub(r"[^A-Za-z0-9]", "", tree.split(scan.subject)[0].removeprefix("sub-"))
    if not label:
        raise InputError(f"{scan.source}: its subject {scan.subject!r} has no letter or digit; rename it")
    return f"sub-{label}"


def _plant(scan: ScanFile, path: Path, person: Person, rng: np.random.Generator, place: int) -> dict[str, Any]:
    """Write one scan; what was changed, for planted.tsv. Raises Refused."""
    volume = nifti.read(scan.path)
    brain, background = planting.brain_of(volume, nifti.read(scan.mask) if scan.mask else None)
    tissue = planting.estimate_tissue(volume, brain, background)
    state = rng.bit_generator.state
    planted = planting.plant(volume, tissue, background, person.severities, rng)
    path.parent.mkdir(parents=True, exist_ok=True)
    copy_with_voxels(scan.path, path, planted.voxels)
    sidecar = scan.path.with_name(tree.split(scan.path.name)[0] + ".json")
    if sidecar.is_file():
        shutil.copyfile(sidecar, path.with_name(tree.split(path.name)[0] + ".json"))
    spacing = spacing_mm(volume.affine)
    voxel_mm3 = float(np.prod(spacing))
    centroids = {f"centroid_{task}_per_mm": "n/a" for task in PLANTED}
    for task in PLANTED if place < SPECTRA_OF else ():
        both = []
        for severity in (1.0, 0.0):
            rng.bit_generator.state = state
            changed = planting.plant(volume, tissue, background, {**dict.fromkeys(PLANTED, 0.0), task: severity}, rng)
            both.append(changed.voxels.astype(np.float64))
        found = effect_report.radial_spectrum([both[0] - both[1]], spacing.tolist())
        centroids[f"centroid_{task}_per_mm"] = f"{found.centroid_per_mm:.4f}"
    return {
        "white_matter_mm3": round(np.count_nonzero(tissue.white) * voxel_mm3),
        "lesions": planted.num_lesions,
        "lesion_mm3": round(np.count_nonzero(planted.lesion) * voxel_mm3),
        "band_mm3": round(np.count_nonzero(tissue.band) * voxel_mm3),
        "changed_voxels": int(np.count_nonzero(planted.voxels != volume.voxels)),
    } | centroids


# --------------------------------------------------------------------------------------------- tables


def _write_tables(
    source: Path,
    dest: Path,
    taken: list[ScanFile],
    people: dict[str, Person],
    rows: list[dict[str, Any]],
    is_bids: bool,
) -> None:
    """All but the scans; the description that makes it a dataset comes last."""
    about: dict[str, Any] = {}
    known: dict[str, dict[str, str]] = {}
    if is_bids and (source / "participants.tsv").is_file():
        known = {row.get("participant_id", ""): row for row in tables.read(source / "participants.tsv")}
        if (source / "participants.json").is_file():
            about = json.loads((source / "participants.json").read_text(encoding="utf-8"))
    firsts: dict[str, ScanFile] = {}
    for scan in taken:
        firsts.setdefault(scan.subject, scan)
    names = {subject: subject if is_bids else participant(scan) for subject, scan in firsts.items()}
    values = {subject: known.get(subject, scan.participant) for subject, scan in firsts.items()}
    columns = dict.fromkeys(name for row in values.values() for name in row if name != "participant_id")
    planted = [f"label_{task}" for task in PLANTED]
    new = {name: f"source_{name}" if name in planted else name for name in columns}
    persons = [
        people[subject]._replace(
            row={"participant_id": names[subject]} | {new[name]: row.get(name) or "n/a" for name in columns}
        )
        for subject, row in values.items()
    ]
    about = {new.get(name, name): text for name, text in about.items()}
    what = {
        "lesions": f"up to {MOST_LESIONS} dark balls of radius {LESION_RADIUS_MM} mm in white matter",
        "sharpness": "detail of the grey/white boundary of the cortex, lower with higher severity",
    }
    for task in PLANTED:
        about[f"label_{task}"] = {
            "Description": f"{STATEMENT} {what[task]}",
            "Levels": cohort_files.LEVELS,
        }
    cohort_files.write_people(dest, persons, about)
    cohort_files.write_table(dest / "planted.tsv", rows)
    for scan in taken:
        if scan.mask:
            _copy(source, dest, scan.mask_source)
            pipeline = "/".join(scan.mask_source.split("/")[:2])
            if (source / pipeline / cohort_files.DESCRIPTION).is_file():
                _copy(source, dest, f"{pipeline}/{cohort_files.DESCRIPTION}")
    (dest / "README").write_text(README, encoding="utf-8")
    cohort_files.write_description(
        dest, f"{source.resolve().name} with planted effects", "brainscale plant", DatasetType="derivative"
    )


def _copy(source: Path, dest: Path, name: str) -> None:
    (dest / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / name, dest / name)
