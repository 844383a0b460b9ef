"""Does a label follow how scans were acquired? Then a model can score well without looking at anatomy.

Every acquisition column, and all of them together, is held against the labels of subjects by Pearson's χ² (the number
of subjects times the squared canonical correlations of shares of categories and classes; ranks for a regression), and
compared with the χ² of shuffled subject labels. p holds for all columns at once (largest over columns: Westfall and
Young 1993, Resampling-Based Multiple Testing). How well a label is told is the cross-validated score of a ridge
regression on left-out subjects.

Only what is decided before anatomy is imaged counts as acquisition: site, contrast, grid, how values are coded, how the
brain was found. Means and deviations of intensity are left out, since disease changes them too, and so are shapes that
differ from scan to scan, as those of files that were cut around each brain.
"""

import base64
import re
import struct
from dataclasses import dataclass

import numpy as np
from scipy.stats import chi2, rankdata
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score, roc_auc_score
from sklearn.model_selection import KFold, StratifiedKFold, cross_val_predict

from brainscale.store import Store
from brainscale.stores import Stores
from brainscale.tasks import Labelled, participant_names, site_column

PARTICIPANT = re.compile(
    r"site|scanner|manufacturer|vendor|model|field|tesla|coil|software|sequence|protocol|station|device|cent(er|re)|"
    r"acquisition|dataset|cohort|batch",
    re.IGNORECASE,
)
"""Names of participant columns that say how a scan was made."""
CATEGORIES = 8
"""A column of numbers with more different values than this is cut at its quartiles."""
BOX_ZYX = (16, 64, 64)
"""Voxels in the middle of a scan whose grey levels are looked at."""
FEW_LEVELS = 256
PERMUTATIONS = 499
TOGETHER = "all of these together"
FEWEST = 3
"""Subjects of each class, at least."""


@dataclass(frozen=True)
class Column:
    """One acquisition column: score of predicting the label from it, and p corrected for all columns."""

    name: str
    score: float
    """AUROC (over classes, one against the rest), or R² of the ranks of a regression."""
    p: float


def columns_of(labelled: Labelled, store: Store | Stores) -> dict[str, np.ndarray]:
    """Column → (n,) value of every scan as a string, "" where it is unknown; columns of one value are left out."""
    at = np.searchsorted(store.rows, labelled.rows)
    headers = [_coding(text) for text in store.column("header_base64")[at].tolist()]
    scale = store.column("scale")[at]
    found: dict[str, np.ndarray] = {
        "contrast": store.column("contrast")[at],
        "skull_stripped": store.column("skull_stripped")[at],
        "foreground_method": store.column("foreground_method")[at],
        "mask given": np.array([bool(mask) for mask in store.column("mask_source")[at].tolist()]),
        "data type": np.array([header[0] if header else "" for header in headers]),
        # The stored scale is the header's where whole numbers are kept, and else follows the scan's deviation.
        "intensity scale": np.array([header[1] if header else value for header, value in zip(headers, scale)]),
        "intensity offset": np.array([header[2] if header else 0.0 for header in headers]),
        "orientation codes": np.array([header[3] if header else "" for header in headers]),
        "source axes": np.array([_axes(np.reshape(affine, (4, 4))) for affine in store.column("affine_source")[at]]),
    }
    for name, source in (("source spacing", "spacing_source_mm_xyz"), ("source shape", "shape_source_xyz")):
        values = np.round(store.column(source)[at].astype(float), 2)
        if name == "source shape" and max(len(np.unique(axis)) for axis in values.T) > CATEGORIES:
            continue  # files cut around each head: their shape is its size, not a choice at the scanner
        found |= {f"{name} {axis}": values[:, number] for number, axis in enumerate("xyz")}
    found |= _grey_levels(labelled.rows, scale, store)
    for name in participant_names(store):
        if PARTICIPANT.search(name) and name not in (labelled.task.column, site_column(labelled.task, store)):
            found[name] = np.array([value or "" for value in store.column(f"participant_{name}")[at].tolist()])
    if labelled.sites.any() and site_column(labelled.task, store) != labelled.task.column:
        found[site_column(labelled.task, store)] = labelled.sites
    texts = {name: _categories(values) for name, values in found.items()}
    return {name: values for name, values in texts.items() if len(set(values.tolist())) > 1}


def follows(labelled: Labelled, columns: dict[str, np.ndarray], level: float, seed: int = 0) -> list[Column] | None:
    """The columns, and all together where there are several, that the label follows at p < level, best score first;
    none where nothing can be said (fewer than 3 subjects of a class or 12 in all)."""
    subjects, inverse = np.unique(labelled.subjects, return_inverse=True)
    y = _of_subjects(labelled, inverse)
    fewest = np.bincount(y, minlength=len(labelled.classes)).min() if labelled.classes else len(subjects)
    if len(subjects) < 4 * FEWEST or fewest < FEWEST:
        return None
    if not columns:
        return []
    blocks = {name: _shares(values, inverse, len(subjects)) for name, values in columns.items()}
    if len(blocks) > 1:
        blocks[TOGETHER] = np.concatenate(list(blocks.values()), axis=1)
    targets = _basis(np.eye(len(labelled.classes))[y] if labelled.classes else rankdata(y)[:, None])
    rng = np.random.default_rng(seed)
    orders = np.stack([np.arange(len(subjects)), *(rng.permutation(len(subjects)) for _ in range(PERMUTATIONS))])
    evidence = np.stack([_evidence(_basis(block), targets[orders]) for block in blocks.values()])
    p = (evidence.max(axis=0) >= evidence[:, :1] - 1e-9).mean(axis=1)
    found = [
        Column(name, _score(block, y, labelled.classes), float(p[k]))
        for k, (name, block) in enumerate(blocks.items())
        if p[k] < level
    ]
    return sorted(found, key=lambda column: -column.score)


def _of_subjects(labelled: Labelled, inverse: np.ndarray) -> np.ndarray:
    """(subjects,) class, or mean value."""
    if labelled.classes:
        return labelled.y[np.unique(inverse, return_index=True)[1]]
    return np.bincount(inverse, labelled.y) / np.bincount(inverse)


def _basis(features_SF: np.ndarray) -> np.ndarray:
    """(S,r) orthonormal directions that the centred features span."""
    left, size, _ = np.linalg.svd(features_SF - features_SF.mean(axis=0), full_matrices=False)
    return left[:, size > 1e-9 * max(1.0, size[0])]


def _evidence(columns_SR: np.ndarray, targets_PSD: np.ndarray) -> np.ndarray:
    """(P,) −log of the χ² distribution's upper tail, which makes columns of different degrees of freedom comparable."""
    count, (_, subjects, dimensions) = columns_SR.shape[1], targets_PSD.shape
    chi = subjects * (np.einsum("sr,psd->prd", columns_SR, targets_PSD, optimize=True) ** 2).sum(axis=(1, 2))
    return -chi2.logsf(chi, max(1, count * dimensions))


def _score(block: np.ndarray, y: np.ndarray, classes: tuple[str, ...]) -> float:
    """AUROC of left-out subjects (over classes, one against the rest), or R² of the ranks of a regression."""
    targets = np.eye(len(classes))[y] if classes else rankdata(y)[:, None]
    folds = int(min(5, np.bincount(y).min())) if classes else 5
    dealer = (StratifiedKFold if classes else KFold)(folds, shuffle=True, random_state=0)
    told = cross_val_predict(Ridge(), block, targets, cv=dealer.split(block, y if classes else None))
    if classes:
        return float(roc_auc_score(targets, told.reshape(targets.shape), average="macro"))
    return float(r2_score(targets, told))


def _shares(values: np.ndarray, inverse: np.ndarray, subjects: int) -> np.ndarray:
    """(subjects, categories) share of a subject's scans in each category."""
    _, category = np.unique(values, return_inverse=True)
    counts = np.zeros((subjects, int(category.max()) + 1))
    np.add.at(counts, (inverse, category), 1.0)
    return counts / counts.sum(axis=1, keepdims=True)


def _categories(values: np.ndarray) -> np.ndarray:
    """Values as strings; many different numbers as the quarter of them that each is in."""
    if values.dtype.kind != "f" or len(different := np.unique(values)) <= CATEGORIES:
        return np.array([_text(value) for value in values.tolist()], dtype=str)
    edges = np.unique(np.quantile(values, [0.25, 0.5, 0.75]))
    quarter = np.searchsorted(edges, values, side="left")
    low, high = [different[0], *edges], [*edges, different[-1]]
    return np.array([f"{low[k]:.4g} to {high[k]:.4g}" for k in quarter.tolist()], dtype=str)


def _text(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)


def _coding(header_base64: str) -> tuple[str, float, float, str] | None:
    """(data type, slope, intercept, codes of qform and sform) of a NIfTI-1 or -2 header; none for what is no header."""
    header = base64.b64decode(header_base64 or "")
    for size, places in ((348, "70h 112f 116f 252h 254h"), (540, "12h 176d 184d 344i 348i")):
        for order in "<>":
            if len(header) >= size and struct.unpack_from(f"{order}i", header)[0] == size:
                kind, slope, inter, qform, sform = (
                    struct.unpack_from(order + place[-1], header, int(place[:-1]))[0] for place in places.split()
                )
                plain = not (np.isfinite(slope) and slope)  # 0 and NaN mean 1 in NIfTI
                return f"{kind}{'' if order == '<' else ' big-endian'}", 1.0 if plain else float(slope), (
                    float(inter) if np.isfinite(inter) and not plain else 0.0
                ), f"q{qform}s{sform}"  # fmt: skip
    return None


def _axes(affine: np.ndarray) -> str:
    """Where each axis of the file points, e.g. RAS."""
    strongest = np.abs(affine[:3, :3]).argmax(axis=0)
    return "".join("LPI RAS"[axis + 4 * int(affine[axis, k] > 0)] for k, axis in enumerate(strongest.tolist()))


def _grey_levels(rows: np.ndarray, scales: np.ndarray, store: Store | Stores) -> dict[str, np.ndarray]:
    """Of a box amid each scan: the step between grey levels, where they lie on a grid that is coarser than the stored
    codes ("" where not), and whether they are few. Not of stored float32."""
    if store.dtype.kind == "f":
        return {}
    z, y, x = (min(size, box) for size, box in zip(store.volume_zyx, BOX_ZYX))
    cz, cy, cx = ((size - box) // 2 for size, box in zip(store.volume_zyx, (z, y, x)))
    steps, few = [], []
    for row, scale in zip(rows.tolist(), scales.tolist()):
        levels = np.unique(store.crop(row, (cz, cy, cx), (z, y, x))).astype(np.int64)
        gaps = np.diff(levels) if len(levels) > 1 else np.ones(1)
        middle = float(np.median(gaps))
        on_grid = middle > 1 and np.quantile(gaps, 0.01) > middle / 2  # chance gaps are often of one code
        steps.append(f"{gaps[gaps <= 1.5 * middle].mean() * scale:.2g}" if on_grid else "")
        few.append(f"{'at most' if len(levels) <= FEW_LEVELS else 'over'} {FEW_LEVELS}")
    return {"grey-level step": np.array(steps), "grey levels": np.array(few)}
