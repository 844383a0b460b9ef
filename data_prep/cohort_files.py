"""The files at the root of a dataset with known effects: participants, the truth behind their labels, the description.

The severities stand in truth.tsv, which no converter reads: in participants.tsv they would travel into the store.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from brainscale import __version__
from brainscale_data_prep import anatomy, effects
from brainscale_data_prep.scanners import SITES
from brainscale_data_prep.severity import ORACLE_AUROC, SEPARATION, Oracle, oracle

TRUTH, DESCRIPTION = "truth", "dataset_description.json"
README = """\
Synthetic brain MRI. No scan of a person is in here: every volume is a deformed, re-painted copy of the symmetric
ICBM152 2009a average template (Fonov et al. 2011, NeuroImage 54:313), with simulated contrast, bias field and noise.
participants.json says which anatomical change belongs to which column, in MNI millimetres; truth.tsv how severe each
change is in each subject, and truth.json how well the severities tell the labels apart. What is found here is found on
planted effects.

The template is Copyright (C) 1993-2009 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological Institute,
McGill University. Permission to use, copy, modify, and distribute it for any purpose and without fee is granted
provided that this notice appears in all copies. It comes "as is", without express or implied warranty.
"""
HEAD_README = """
Skull, scalp, face and neck are simple synthetic shapes around the brain, not anatomy.
"""
LEVELS = {"0": "severities around the lower mean", "1": "severities around the higher mean"}


class Person(NamedTuple):
    """What the tables say of a subject."""

    row: dict[str, Any]
    """participant_id and the columns of participants.tsv that are no labels of a task here."""
    labels: Mapping[str, int]
    severities: Mapping[str, float]


def label_of(number: int) -> str:
    """participant_id of a subject of a phantom cohort, counted from 1."""
    return f"sub-{number:03d}"


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows with the same columns as .tsv."""
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0], delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(table.getvalue(), encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Indented; NaN is refused."""
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_people(dest: Path, people: Sequence[Person], about: Mapping[str, Any]) -> None:
    """participants.tsv, truth.tsv (severities by six decimals) and what their columns mean; `about`: participants.json.

    All people have the same tasks.
    """
    tasks = list(people[0].labels)
    labels = [{f"label_{task}": person.labels[task] for task in tasks} for person in people]
    write_table(dest / "participants.tsv", [person.row | label for person, label in zip(people, labels)])
    write_json(dest / "participants.json", about)
    truth: dict[str, Any] = {"participant_id": {"Description": "Subject"}}
    for task in tasks:
        found = oracle([person.labels[task] for person in people], [person.severities[task] for person in people])
        truth[f"severity_{task}"] = {
            "Description": f"Decides the effect's size; normal, variance 1, mean ±{SEPARATION / 2:.4f} by the label",
            "Label": f"label_{task}",
            "Separation": round(SEPARATION, 4),
            "OracleAuroc": ORACLE_AUROC,
            "CohortAuroc": numbers(found),
        }
    severities = [{f"severity_{task}": f"{person.severities[task]:.6f}" for task in tasks} for person in people]
    names = [{"participant_id": person.row["participant_id"]} for person in people]
    write_table(dest / f"{TRUTH}.tsv", [name | severity for name, severity in zip(names, severities)])
    write_json(dest / f"{TRUTH}.json", truth)


def numbers(found: Oracle) -> dict[str, float] | None:
    """An oracle's AUROC and 95 % interval, or null where a label has one value alone."""
    return None if found.auroc != found.auroc else {name: round(value, 4) for name, value in found._asdict().items()}


def write_description(dest: Path, name: str, command: str, **more: Any) -> None:
    """dataset_description.json and .bidsignore: the folder is a dataset from here on."""
    (dest / ".bidsignore").write_text(f"{TRUTH}.*\neffects.*\nplanted.tsv\n", encoding="utf-8")
    generated = [{"Name": command, "Version": __version__}]
    description = {"Name": name, "BIDSVersion": "1.10.0", "DatasetType": "raw", "GeneratedBy": generated} | more
    write_json(dest / DESCRIPTION, description)


def columns(confound: tuple[str, float] | None) -> dict[str, Any]:
    """participants.json of a phantom cohort: every column and the anatomical change behind it, places in MNI mm."""
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
    places = places_of_effects()
    ageing = {
        "Effect": "the ventricles' region grows outwards from its centre",
        "CentreMm": [effects.VENTRICLES_MM[0]],
        "StandardDeviationMm": effects.VENTRICLES_MM[1],
    }
    follows = f"; follows {confound[0]} with strength {confound[1]}" if confound else "; independent of the labels"
    return {
        "participant_id": {"Description": "Subject; all share one asymmetry", "Anatomy": asymmetry},
        "age": {
            "Description": "Age, uniform, independent of the labels",
            "Units": "year",
            "Anatomy": [ageing, places["atrophy"][1]],
        },
        "sex": {"Description": "Sex; M brains are 5 % longer on average", "Levels": {"F": "female", "M": "male"}},
        "site": {"Description": "Scanner; changes no anatomy" + follows, "Levels": scanners},
    } | {
        f"label_{task}": {"Description": f"Simulated {task}", "Levels": LEVELS, "Anatomy": where}
        for task, where in places.items()
    }


def places_of_effects() -> dict[str, list[dict[str, Any]]]:
    """Task → what its severity changes, and where."""
    loss = "grey matter gives way to cerebrospinal fluid"

    def both(centre_mm: effects.Mm) -> list[effects.Mm]:
        x, y, z = centre_mm
        return [(-x, y, z), (x, y, z)]

    return {
        "atrophy": [
            {
                "Effect": "ventricles widen: tissue beside them gives way to cerebrospinal fluid",
                "CentreMm": [effects.VENTRICLES_MM[0]],
                "StandardDeviationMm": effects.VENTRICLES_MM[1],
            },
            {
                "Effect": f"{loss} in both hippocampi, also with age",
                "CentreMm": both(effects.HIPPOCAMPUS_MM[0]),
                "StandardDeviationMm": effects.HIPPOCAMPUS_MM[1],
            },
        ],
        "lesions": [
            {
                "Effect": f"up to {effects.MOST_LESIONS} small balls in white matter, dark in T1w, else bright",
                "CentreMm": both(effects.LESIONS_MM[0]),
                "StandardDeviationMm": effects.LESIONS_MM[1],
                "RadiusMm": effects.LESION_RADIUS_MM,
            }
        ],
        "sharpness": [
            {
                "Effect": "the grey/white boundary of the cortex is blurred; sharpened by low severities",
                "OutsideCentreMm": [effects.DEEP_MM[0]],
                "OutsideHalfAxesMm": effects.DEEP_MM[1],
                "NotBehindAndBelowMm": effects.BELOW_MM,
                "BlurMm": effects.BLUR_MM,
            }
        ],
        "mass": [
            {
                "Effect": "a mass in one hemisphere pushes what surrounds it; oedema in the white matter around it",
                "CentreMm": both(effects.MASS_MM[0]),
                "StandardDeviationMm": effects.MASS_MM[1],
                "RadiusMm": (0.0, effects.MASS_RADIUS_MM),
                "OedemaRadii": effects.OEDEMA_RADII,
            }
        ],
        "distributed": [
            {
                "Effect": "tissue gives way to cerebrospinal fluid, by a severity of its own in each region",
                "CentreMm": effects.REGIONS_MM,
                "StandardDeviationMm": effects.REGION_STD_MM,
            }
        ],
    }
