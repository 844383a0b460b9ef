"""Which scans a source holds: a BIDS dataset, any other folder, or a table. Only names are looked at, no voxels."""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from bids2table import parse_bids_entities  # type: ignore[import-untyped]

from brainscale.settings import InputError
from brainscale_data_prep import bids, tables, tree
from brainscale_data_prep.bids import BIDS_SUFFIXES
from brainscale_data_prep.tables import PARTICIPANT_COLUMNS

KINDS_SHOWN = 12
"""Kinds of skipped volumes counted one by one; the rarer ones are "other"."""
OUTSIDE = "it links to a place outside the source; copy it inside, or give --follow-links"


@dataclass(frozen=True)
class ScanFile:
    """One scan that was asked for. `code` and `sentence` are filled for one that must be refused unread."""

    id: str
    path: Path
    source: str
    """Path relative to the source's root, with '/'; characters that no text file can hold are escaped."""
    subject: str = ""
    session: str = ""
    contrast: str = ""
    participant: dict[str, str] = field(default_factory=dict)
    mask: Path | None = None
    """Brain mask that comes with the scan, on any grid of the same world."""
    mask_source: str = ""
    """Its path relative to the source's root, with '/'."""
    code: str = ""
    sentence: str = ""


@dataclass(frozen=True)
class Found:
    scans: list[ScanFile]
    """Sorted by source; an index here is a row of the store."""
    skipped: dict[str, int]
    """Volumes that are not selected, counted by BIDS suffix (or by what they are)."""


@dataclass(frozen=True)
class _Wish:
    """What the caller selects (see `find`)."""

    suffixes: tuple[str, ...] | None
    follow_links: bool
    columns: tuple[str, ...]
    entities: Mapping[str, str]
    mask_pipeline: str

    def misses(self, entities: Mapping[str, str], contrast: str, default: Sequence[str] | None = None) -> str:
        """Under which name a scan that is not selected is counted, or ''. `default`: suffixes where none were given."""
        wanted = default if self.suffixes is None else self.suffixes
        if wanted is not None and contrast not in wanted:
            return _kind(contrast)
        for name, value in self.entities.items():
            if entities.get(name, "") != value:
                return _kind(contrast) + (f" without {name}-{value}" if value else f" with {name}")
        return ""


def _kind(contrast: str) -> str:
    return contrast if contrast.isascii() and contrast.isalnum() else "other"


def find(
    source: Path,
    suffixes: Sequence[str] | None = None,
    follow_links: bool = False,
    participant_columns: Sequence[str] = PARTICIPANT_COLUMNS,
    entities: Mapping[str, str] | None = None,
    mask_pipeline: str = "",
) -> Found:
    """List the scans of a folder or of a .csv, .tsv or .parquet table. Raises InputError where there is none.

    A folder with dataset_description.json is BIDS, raw or derivative: what it holds under sub-*/[ses-*/]anat with one
    of `suffixes` (default BIDS_SUFFIXES). A derivative dataset often holds one scan in several spaces: each is a scan
    of its own (space, res and desc are part of the id). Elsewhere every NIfTI file or row is taken, or those whose
    suffix (a table's column contrast) is among `suffixes`. `entities` selects further: {"space": "MNI152NLin6Asym"}
    takes that space alone, "" stands for scans without the entity.

    Links and rows that leave the source are refused unless `follow_links`; it also walks linked folders, each real
    folder once. `participant_columns` (and label_*) are taken from participants.tsv, sessions.tsv and scans.tsv, the
    most specific value first, or from a table; tables outside the source, such as a derivative's raw dataset, are not
    looked at. Brain masks are found in a BIDS dataset and its derivatives/* by the rules of `bids.Masks`, or in a
    table's column mask; `mask_pipeline` restricts them to derivatives/NAME, "none" takes none.
    """
    if suffixes is not None:
        bids.check_suffixes(suffixes)
    bids.check_entities(entities or {})
    wanted = None if suffixes is None else tuple(suffixes)
    wish = _Wish(wanted, follow_links, tuple(participant_columns), entities or {}, mask_pipeline)
    if source.is_dir():
        found = _folder(source, wish)
        kind = f"a BIDS dataset (anat: {', '.join(wanted or BIDS_SUFFIXES)})" if bids.is_dataset(source) else "NIfTI"
    elif source.suffix in (".csv", ".tsv", ".parquet"):
        found, kind = _table(source, wish), "rows"
    else:
        raise InputError(
            f"{source} is neither a folder nor a .csv, .tsv or .parquet table; give the folder that holds the scans"
        )
    if not found.scans:
        others = ", ".join(f"{count} {name}" for name, count in sorted(found.skipped.items()))
        there = f" ({others} are there but not selected)" if others else ""
        advice = "give the folder that holds them" + (", or select others with --suffix" if others else "")
        advice = "convert DICOM with dcm2niix first" if "dicom" in found.skipped else advice
        raise InputError(f"{source} holds no scans: looked for {kind}{there}; {advice}")
    return replace(found, scans=_refuse_repeated(sorted(found.scans, key=lambda scan: scan.source)))


def _refuse_repeated(scans: list[ScanFile]) -> list[ScanFile]:
    first: dict[str, str] = {}
    kept = []
    for scan in scans:
        if scan.id in first and not scan.code:
            sentence = f"its id {scan.id!r} was already given to {first[scan.id]}"
            scan = replace(scan, code="duplicate", sentence=sentence)
        first.setdefault(scan.id, scan.source)
        kept.append(scan)
    return kept


def _scan(path: Path, source: str, name: str, entities: Mapping[str, str], whose: str = "", **faults: str) -> ScanFile:
    """A scan as its name describes it; refused for the first of `faults` (code=sentence) that is not empty.

    `whose` replaces `source` where a file without BIDS entities is given to a subject.
    """
    subject, session, contrast = _subject_of(whose or source, name), "", entities.get("suffix", "")
    if "sub" in entities:
        subject = f"sub-{entities['sub']}"
        session = f"ses-{entities['ses']}" if "ses" in entities else ""
    elif contrast not in bids.ANATOMICAL:
        contrast = ""
    if not (tree.storable(source) and tree.storable(name)):
        source, name, subject, session, contrast = tree.escape(source), tree.escape(name), "", "", ""
        faults = {"bad_name": "its name holds line breaks, control characters or bytes that are no UTF-8; rename it"}
    code, sentence = next(((code, sentence) for code, sentence in faults.items() if sentence), ("", ""))
    return ScanFile(name, path, source, subject, session, contrast, code=code, sentence=sentence)


def _subject_of(source: str, name: str) -> str:
    """Whose scan a file without BIDS entities is: a folder sub-*, else the first folder, else the file stands alone."""
    folders = PurePosixPath(source).parts[:-1]
    named = [folder for folder in folders if re.fullmatch(r"sub-[A-Za-z0-9]+", folder)]
    return (named or [*folders[:1], name])[0]


def _not_anatomical(suffix: str) -> str:
    what = bids.NOT_ANATOMICAL.get(suffix, "")
    return f"it is {what} by its name (suffix {suffix}), not an anatomical image" if what else ""


# --------------------------------------------------------------------------------------------- folders


def _folder(root: Path, wish: _Wish) -> Found:
    search = tree.Search(root, wish.follow_links)
    scans = _dataset(search, wish) if bids.is_dataset(root) else _plain_folder(search, wish)
    scans += [_scan(root / link, link, link, {}, outside_root=OUTSIDE) for link in search.leaving]
    return Found(scans, _frequent(search.skipped))


def _plain_folder(search: tree.Search, wish: _Wish) -> list[ScanFile]:
    if wish.mask_pipeline not in ("", "none"):
        raise InputError(
            f"{search.root} is no BIDS dataset and has no masks of {wish.mask_pipeline}; leave --masks out"
        )
    people, scans = bids.People(search, wish.columns), []
    for source, suffix, is_link in search.volumes("", lambda folder: True, people.read):
        entities = parse_bids_entities(source)
        contrast = entities.get("suffix", "")
        if missed := wish.misses(entities, contrast):
            search.skipped[missed] += 1
            continue
        scan = _scan(
            search.root / source,
            source,
            source.removesuffix(suffix),
            entities,
            outside_root=OUTSIDE if is_link and search.leaves(source) else "",
            not_a_brain_scan=_not_anatomical(contrast),
        )
        scans.append(replace(scan, participant=people.of(scan.subject, scan.session, source)))
    return scans


def _dataset(search: tree.Search, wish: _Wish) -> list[ScanFile]:
    root, people, masks = search.root, bids.People(search, wish.columns), bids.Masks(wish.mask_pipeline)
    masks.add_derivatives(search)
    taken = []
    for source, suffix, is_link in search.volumes("", lambda folder: folder.startswith("sub-"), people.read):
        entities = parse_bids_entities(source)
        contrast, fault = entities.get("suffix", ""), bids.name_fault(source, entities)
        if not fault:
            masks.add(source, entities, "")
        anatomical = bool(fault) or entities.get("datatype") == "anat"
        if missed := wish.misses(entities, contrast, BIDS_SUFFIXES) if anatomical else _kind(contrast):
            search.skipped[missed] += 1
            continue
        name = source.rpartition("/")[2].removesuffix(suffix)
        outside = OUTSIDE if is_link and search.leaves(source) else ""
        taken.append((_scan(root / source, source, name, entities, bad_name=fault, outside_root=outside), entities))
    scans = []
    for scan, entities in taken:
        mask = "" if scan.code else masks.of(scan.source, entities)
        if mask and search.leaves(mask):
            search.skipped["mask outside the source"] += 1
            mask = ""
        values = people.of(scan.subject, scan.session, scan.source)
        scans.append(
            replace(scan, participant=values, mask=root / mask if mask else None, mask_source=tree.escape(mask))
        )
    return scans


def _frequent(skipped: Counter[str]) -> dict[str, int]:
    shown = dict((+skipped).most_common(KINDS_SHOWN))
    rest = skipped.total() - sum(shown.values())
    return {**shown, "other": shown.get("other", 0) + rest} if rest else shown


# --------------------------------------------------------------------------------------------- tables


def _table(table: Path, wish: _Wish) -> Found:
    """Columns: path (relative to the table's folder, or inside it); optional id, subject, session, contrast, mask (a
    path too) and the participant's."""
    if not table.is_file():
        raise InputError(f"{table} does not exist; give a folder or a .csv, .tsv or .parquet table")
    if wish.mask_pipeline not in ("", "none"):
        raise InputError(f"{table} names masks in a column mask, not by pipeline; leave --masks out or give none")
    rows, search = tables.read(table), tree.Search(Path(os.path.abspath(table.parent)), wish.follow_links)
    places = []
    for number, row in enumerate(rows, start=1):
        if not row.get("path") or "\0" in row["path"] + row.get("mask", ""):
            columns = ", ".join(row)
            raise InputError(f"{table}: row {number} has no usable 'path' (columns: {columns}); name the scan's file")
        places.append(_place(search.root, row["path"]))
    beyond = [path.parent for path, source in places if not path.is_relative_to(search.root)]
    common = os.path.commonpath(beyond) if beyond else ""
    scans = []
    for row, (path, source) in zip(rows, places):
        entities = parse_bids_entities(path)
        suffix = entities.get("suffix", "")
        if missed := wish.misses(entities, row.get("contrast") or suffix):
            search.skipped[missed] += 1
            continue
        whose = source if path.is_relative_to(search.root) else path.relative_to(common).as_posix()
        name = row.get("id") or source.removesuffix(tree.split(source)[1])
        mask, mask_source = None, ""
        if row.get("mask", "") not in tables.MISSING and wish.mask_pipeline != "none":
            mask, mask_source = _place(search.root, row["mask"])
        leaves = "path" if search.leaves(str(path)) else "mask" if mask and search.leaves(str(mask)) else ""
        sentence = f"its {leaves} leads outside {search.root.name}; move it or the table, or give --follow-links"
        scan = _scan(
            path,
            source,
            name,
            entities,
            whose,
            outside_root=sentence if leaves else "",
            not_a_brain_scan=_not_anatomical(suffix),
        )
        scan = replace(
            scan,
            subject=row.get("subject") or scan.subject,
            session=row.get("session") or scan.session,
            contrast=row.get("contrast") or scan.contrast,
        )
        values = tables.allowed(row, wish.columns)
        scans.append(replace(scan, participant=values, mask=mask, mask_source=mask_source))
    return Found(scans, _frequent(search.skipped))


def _place(root: Path, text: str) -> tuple[Path, str]:
    """A table's file and its source: relative to the root, or as it was written where it lies elsewhere."""
    path = Path(os.path.normpath(root / text))
    return path, path.relative_to(root).as_posix() if path.is_relative_to(root) else Path(text).as_posix()
