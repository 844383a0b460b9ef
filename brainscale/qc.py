"""The QC page of a store: one self-contained file for people, drawn from a finished store and nothing else.

What was cropped leads, then what was refused and why, how the taken scans are distributed, and pictures with the
unusual ones first. Neither torch nor the source is needed, and the page names no path, host or time: equal stores give
equal pages. The words are in qc.html.
"""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from brainscale.figures import OPPOSITE
from brainscale.pages import SORT, put, render
from brainscale.qc_figures import COLOURS, cropped_chart, histogram_rows, three_planes
from brainscale.qc_scans import AXES, MIN_PEERS, OUTLIER, Scans, unusual
from brainscale.store import Store, open_store

MAX_PICTURED = 240
"""Scans with pictures, at most: some 4 MB."""
MAX_CROPPED = 12
"""Rows of the table of the most cropped scans."""
FULL_CELL = 250
"""A cell of this share (of 255) or more is full of foreground."""
MAX_LISTED = 500
"""Refused scans that are named, shared out over the reasons; as many with a warning."""

REFUSED = {
    "bad_mask": "the mask that comes with it cannot be read, or covers nothing of it",
    "bad_name": "a name that cannot be stored, or that contradicts its folder",
    "complex": "voxels are complex numbers",
    "constant": "one value everywhere: nothing to see",
    "does_not_fit": "too much of the foreground would be cut off by the grid",
    "duplicate": "the id was already given to another scan",
    "empty_file": "the file has 0 bytes",
    "four_d": "a series of volumes, not one",
    "gzip_crc": "the compressed stream is damaged",
    "no_affine": "the header does not say where left and right are",
    "no_mask": "the plan asks for a mask and none is given",
    "not_3d": "not the shape of a volume",
    "not_a_brain_scan": "labels or another kind of image, not an intensity image of a brain",
    "not_nifti": "not a NIfTI file",
    "outside_root": "a link or path that leaves the source folder",
    "pointer_file": "a git-annex or git-lfs pointer: the content was never downloaded",
    "rgb": "voxels are colours",
    "singular_affine": "the header's geometry is impossible",
    "thin_slab": "too thin along an axis to hold a brain",
    "too_coarse": "outliers so far that the anatomy would be lost between two stored steps",
    "too_large": "more voxels or bytes than are read",
    "truncated": "the file ends too early",
    "unreadable": "anything else; the sentence says what",
}
"""What the reasons of a refusal mean."""
WARNINGS = {
    "assumed_orientation": "the header gives no orientation; the one that was asked for was assumed",
    "bad_pixdim": "the header's voxel size is zero, negative or another than its affine's; the affine was taken",
    "bright_background": "most of the volume's faces is foreground: the air may be brighter than the head",
    "cropped": "part of the foreground lies outside the grid",
    "duplicate_of": "equal, voxel for voxel, to another scan",
    "frame": "one frame of a series",
    "negative_slope": "the header's intensity slope is negative: stored values fall as intensities rise",
    "non_finite": "some voxels were NaN or infinite and became background; their count follows the code",
    "odd_units": "the header declares another unit than mm; nothing was converted",
    "qform_sform_conflict": "the header's two geometries disagree; the sform was taken",
    "quantum_widened": "values span so much that they are stored more coarsely than the plan asks",
    "rounded_integers": "whole numbers of more than 16 bits (or 8), stored in steps of more than 1",
    "sheared": "the axes of the affine are not perpendicular",
    "size_mismatch": "bytes follow the voxels that the header does not announce",
    "wrong_suffix": "compressed or not, other than the file's name says",
}
"""What the warnings of a taken scan mean."""

SCRIPT = """
const find = document.getElementById("find"), only = document.getElementById("only");
const cards = Array.from(document.querySelectorAll("#pictures .scan"));
function filter() {
  let shown = 0;
  for (const card of cards) {
    const words = find.value.toLowerCase().split(" ");
    card.hidden = !words.every(word => card.dataset.text.includes(word)) || only.checked && !card.dataset.warned;
    shown += !card.hidden;
  }
  document.getElementById("shown").textContent = shown + " of " + cards.length + " shown";
}
find.oninput = only.onchange = filter;
document.getElementById("filter").hidden = false;
"""
"""Hides pictures; the page is complete without it. Its hash stands in the page's policy, so nothing else can run."""


def write(store_path: Path, out: Path | None = None) -> Path:
    """Write the QC page of a finished store, by default to STORE.qc.html beside it, and return its path.

    It is not in the store, whose every file is listed and hashed.

    Equal stores give equal bytes. Raises InputError when the folder is no finished store, StoreDamage when it is not as
    it was written.
    """
    store = open_store(store_path)
    path = Path(store_path).absolute()
    out = Path(out or path.with_name(f"{path.name}.qc.html"))
    scans = Scans(store)
    page = render(
        "qc.html",
        script=SORT + SCRIPT,
        plan=store.plan,
        plan_hash=store.plan_hash,
        plan_text=json.dumps(store.plan.model_dump(mode="json"), indent=1),
        grid_xyz=store.volume_zyx[::-1],
        counts=counts(store, scans),
        cropping=cropping(store, scans),
        refused=by_code(((r["reason"], r["source"], r["sentence"]) for r in store.refused), REFUSED),
        warned=by_code(warned(scans), WARNINGS),
        distributions=distributions(scans),
        pictures=pictures(store, scans),
        outlier=OUTLIER,
        min_peers=MIN_PEERS,
    )
    return put(page, out)


def counts(store: Store, scans: Scans) -> dict[str, Any]:
    """What the page's head says in figures."""
    subjects = [subject or scan for subject, scan in zip(store.column("subject"), scans.ids)]
    return {
        "taken": len(scans.rows),
        "refused": len(store.refused),
        "warned": sum(len(codes) > 0 for codes in scans.warnings),
        "subjects": len(set(subjects)),
        "sessions": len(set(zip(subjects, store.column("session")))),
        "megabytes": store.num_bytes / 1e6,
        "contrasts": Counter(scans.contrasts).most_common(),
        "methods": Counter(store.column("foreground_method")).most_common(),
        "with_skull": int(np.sum(~store.column("skull_stripped"))),
    }


def cropping(store: Store, scans: Scans) -> dict[str, Any]:
    """How much foreground was lost, and the scans that lost most, with the sides of the grid where it was cut."""
    worst = [at for at in np.argsort(-scans.cropped, kind="stable")[:MAX_CROPPED] if scans.cropped[at] > 0]
    rows = [{"id": scans.ids[at], "cropped": scans.cropped[at], "cut": cut_sides(store, scans, at),
             "planes": planes_of(store, scans, at)} for at in worst]  # fmt: skip
    return {
        "any": int(np.sum(scans.cropped > 0)),
        "over_1": int(np.sum(scans.cropped > 0.01)),
        "over_5": int(np.sum(scans.cropped > 0.05)),
        "highest": float(scans.cropped.max()),
        "worst": rows,
        "chart": cropped_chart(scans.cropped) if worst else "",
    }


def cut_sides(store: Store, scans: Scans, at: int) -> list[tuple[str, float]]:
    """(letter, mm of the scan that lie beyond), most first, of the sides where a cell full of foreground lies at the
    grid's face and the scan goes on behind it."""
    cells_xyz = store.foreground([scans.rows[at]])[0].T
    found = []
    for axis, letter in enumerate(store.plan.orientation):
        first, last = (cells_xyz.take(i, axis).max() >= FULL_CELL for i in (0, -1))
        found.append((OPPOSITE[letter], scans.outside_low_mm[at, axis], first))
        found.append((letter, scans.outside_high_mm[at, axis], last))
    sides = [(letter, float(mm)) for letter, mm, full in found if full and mm >= 1]
    return sorted(sides, key=lambda side: -side[1])


# ------------------------------------------------------------------------------------------------- lists


def warned(scans: Scans) -> Iterable[tuple[str, str, str]]:
    """(code, source, what is known of it) of every warning."""
    for at, codes in enumerate(scans.warnings):
        for text in codes:
            code, _, detail = text.partition(":")
            if code == "cropped":
                detail = f"{100 * scans.cropped[at]:.1f} % of its foreground"
            elif code == "duplicate_of":
                detail = scans.duplicate_of[at]
            yield code, scans.sources[at], detail


def by_code(items: Iterable[tuple[str, str, str]], meanings: dict[str, str]) -> list[dict[str, Any]]:
    """(code, source, sentence) gathered by code, the most frequent first; each names its share of MAX_LISTED."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for code, source, sentence in items:
        groups.setdefault(code, []).append((source, sentence))
    listed = MAX_LISTED // max(len(groups), 1)
    return [
        {"code": code, "meaning": meanings.get(code, ""), "count": len(found), "listed": found[:listed]}
        for code, found in sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))
    ]


# ------------------------------------------------------------------------------------------------- distributions


def distributions(scans: Scans) -> dict[str, Any]:
    """Histograms by title, their legend, and five quantiles of every quantity; by contrast while there are few."""
    names = [name for name, _ in Counter(scans.contrasts).most_common()]
    if len(names) > len(COLOURS):
        names = []
    groups = [np.flatnonzero(scans.contrasts == name) for name in names] or [np.arange(len(scans.rows))]
    spacing = {axis: scans.spacing_xyz[:, i] for i, axis in enumerate(AXES)}
    shape = {axis: scans.shape_xyz[:, i].astype(float) for i, axis in enumerate(AXES)}
    levels = {"clip low": scans.clip_low, "mean": scans.mean, "clip high": scans.clip_high}
    intensity = {name: values - scans.background for name, values in levels.items()} | {"std": scans.std}
    foreground = {"share": 100 * scans.foreground}
    panels = (
        ("spacing of the source", "spacing", spacing, "mm"),
        ("size of the source", "size", shape, "voxels"),
        ("intensity of the foreground, above background", "intensity", intensity, "units of the source"),
        ("foreground in the grid", "foreground", foreground, "% of the voxels"),
    )
    table = []
    for title, _, rows, unit in panels:
        for name, values in rows.items():
            for i, group in enumerate(groups):
                found = np.percentile(values[group], (0, 5, 50, 95, 100))
                table.append({"title": title, "name": name, "unit": unit, "contrast": names[i] if names else "all",
                              "quantiles": found.tolist()})  # fmt: skip
    return {
        "charts": {title: histogram_rows(name, rows, groups, unit) for title, name, rows, unit in panels},
        "legend": list(zip(names, COLOURS)) if len(names) > 1 else [],
        "table": table,
    }


# ------------------------------------------------------------------------------------------------- pictures


def pictures(store: Store, scans: Scans) -> dict[str, Any]:
    """At most MAX_PICTURED scans: the unusual ones, the most unusual first, then an even sample of the others."""
    scores, reasons = unusual(scans)
    odd = [int(at) for at in np.argsort(-scores, kind="stable") if scores[at] >= OUTLIER]
    others = np.flatnonzero(scores < OUTLIER)
    room = min(max(MAX_PICTURED - len(odd), 0), len(others))
    sample = others[np.linspace(0, len(others) - 1, room).round().astype(int)] if room else []
    cards = []
    for at in [*odd[:MAX_PICTURED], *map(int, sample)]:
        said = (scans.ids[at], scans.contrasts[at], *scans.warnings[at], *reasons[at])
        cards.append({
            "id": scans.ids[at], "contrast": scans.contrasts[at], "warnings": list(scans.warnings[at]),
            "reasons": reasons[at], "planes": planes_of(store, scans, at), "text": " ".join(said).lower(),
        })  # fmt: skip
    return {"cards": cards, "unusual": len(odd), "shown_unusual": min(len(odd), MAX_PICTURED), "of": len(scores)}


def planes_of(store: Store, scans: Scans, at: int) -> list[dict[str, Any]]:
    """The three planes of the scan at this place in `scans`, black at the background (or the lower clip bound, if that
    is darker) and white at the upper clip bound."""
    row = [scans.rows[at]]
    darkest = min(scans.background[at], scans.clip_low[at])
    black, white = ((value - scans.offset[at]) / scans.scale[at] for value in (darkest, scans.clip_high[at]))
    box_xyz = [slice(*ends) for ends in zip(scans.first_xyz[at].tolist(), scans.stop_xyz[at].tolist())]
    return three_planes(
        store.volumes(row)[0],
        store.foreground(row)[0],
        (black, white),
        scans.stored_spacing_xyz[at].tolist(),
        store.plan.orientation,
        (box_xyz[2], box_xyz[1], box_xyz[0]),
    )
