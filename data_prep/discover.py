"""Which scans a source holds: a BIDS dataset, any other folder, or a table. Only names are looked at, no voxels."""

import csv
import os
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from bids2table import parse_bids_entities  # type: ignore[import-untyped]

from brainscale.config import InputError

BIDS_SUFFIXES = ("T1w", "T2w", "FLAIR", "PDw", "inplaneT2")
VOLUME_SUFFIXES = (".nii.gz", ".nii", ".hdr")
PARTICIPANT_COLUMNS = ("age", "sex", "gender", "group", "site", "scanner")
PARTICIPANT_PREFIX = "label_"
MISSING = ("", "n/a", "N/A")


@dataclass(frozen=True)
class ScanFile:
    """One scan that was asked for. `code` and `sentence` are filled for one that must be refused unread."""

    id: str
    path: Path
    source: str
    """Path relative to the source's root, with '/'."""
    subject: str = ""
    session: str = ""
    contrast: str = ""
    participant: dict[str, str] = field(default_factory=dict)
    mask: Path | None = None
    """Brain mask that comes with the scan, on the same voxels."""
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


def find(source: Path) -> Found:
    """List the scans of a folder or of a .csv, .tsv or .parquet table. Raises InputError where there is none."""
    if source.is_dir():
        found = _folder(source)
        kind = (
            "a BIDS dataset (anat: " + ", ".join(BIDS_SUFFIXES) + ")" if _is_bids(source) else "*.nii, *.nii.gz, *.hdr"
        )
    elif source.suffix in (".csv", ".tsv", ".parquet"):
        found, kind = _table(source), "rows"
    else:
        raise InputError(
            f"{source} is neither a folder nor a .csv, .tsv or .parquet table; give the folder that holds the scans"
        )
    if not found.scans:
        others = f" ({_counts(found.skipped)} are there but not selected)" if found.skipped else ""
        raise InputError(f"{source} holds no scans: looked for {kind}{others}; give the folder that holds them")
    return replace(found, scans=_refuse_repeated(sorted(found.scans, key=lambda scan: scan.source)))


def _counts(skipped: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(skipped.items()))


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


# --------------------------------------------------------------------------------------------- folders


def _is_bids(root: Path) -> bool:
    return (root / "dataset_description.json").exists()


def _folder(root: Path) -> Found:
    bids, skipped = _is_bids(root), Counter[str]()
    participants = _participants(root / "participants.tsv")
    scans = []
    for folder, folders, files in os.walk(root, onerror=_unlistable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        here = Path(folder)
        if bids and here == root:
            folders[:] = [name for name in folders if name.startswith("sub-")]
            files = []
        for name in [name for name in folders if (here / name).is_symlink()]:
            if _leaves(root, here / name):
                scans.append(_outside(here / name, root))
            else:
                skipped["folder link"] += 1
        for name in files:
            stem, suffix = _split(name)
            if not suffix:
                continue
            path = here / name
            source = path.relative_to(root).as_posix()
            entities = parse_bids_entities(source)
            if bids and (entities.get("datatype") != "anat" or entities.get("suffix") not in BIDS_SUFFIXES):
                skipped[str(entities.get("suffix", "other"))] += 1
            elif path.is_symlink() and _leaves(root, path):
                scans.append(_outside(path, root))
            else:
                scans.append(_scan(path, source, stem if bids else source.removesuffix(suffix), entities, participants))
    return Found(scans, dict(skipped))


def _unlistable(error: OSError) -> None:
    raise InputError(f"{error.filename} cannot be listed ({error.strerror}); allow reading it or leave it out")


def _split(name: str) -> tuple[str, str]:
    for suffix in VOLUME_SUFFIXES:
        if name.endswith(suffix) and not name.startswith("."):
            return name.removesuffix(suffix), suffix
    return name, ""


def _scan(path: Path, source: str, name: str, entities: dict[str, Any], people: dict[str, dict[str, str]]) -> ScanFile:
    if "sub" not in entities:
        subject = _subject_of(source, name)
        return ScanFile(name, path, source, subject, participant=people.get(subject, {}))
    subject = f"sub-{entities['sub']}"
    session = f"ses-{entities['ses']}" if "ses" in entities else ""
    return ScanFile(name, path, source, subject, session, str(entities.get("suffix", "")), people.get(subject, {}))


def _subject_of(source: str, name: str) -> str:
    """Whose scan a file without BIDS entities is: a folder sub-*, else the first folder, else the file stands alone."""
    folders = PurePosixPath(source).parts[:-1]
    named = [folder for folder in folders if re.fullmatch(r"sub-[A-Za-z0-9]+", folder)]
    return (named or [*folders[:1], name])[0]


def _leaves(root: Path, path: Path) -> bool:
    return not path.resolve().is_relative_to(root.resolve())


def _outside(path: Path, root: Path) -> ScanFile:
    source = path.relative_to(root).as_posix()
    return ScanFile(
        source, path, source, code="outside_root", sentence="it links to a place outside the source; copy it inside"
    )


def _participants(path: Path) -> dict[str, dict[str, str]]:
    """Allowed columns of participants.tsv by participant id ('sub-' in front); n/a is left out."""
    if not path.is_file():
        return {}
    people: dict[str, dict[str, str]] = {}
    for row in _rows(path, "\t"):
        name = row.get("participant_id") or ""
        if not name:
            raise InputError(f"{path} has a row without participant_id; name the participant or remove the row")
        name = name if name.startswith("sub-") else f"sub-{name}"
        values = _allowed(row)
        if people.setdefault(name, values) != values:
            raise InputError(f"{path} describes {name} twice and differently; keep one row per participant")
    return people


def _allowed(row: dict[str, str]) -> dict[str, str]:
    return {
        name.lower(): value
        for name, value in row.items()
        if (name.lower() in PARTICIPANT_COLUMNS or name.lower().startswith(PARTICIPANT_PREFIX)) and value not in MISSING
    }


# --------------------------------------------------------------------------------------------- tables


def _rows(path: Path, delimiter: str) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter, restval="", restkey="")
            return [{k: v.strip() for k, v in row.items() if k} for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a table in UTF-8: {error}") from None


def _table(table: Path) -> Found:
    """Columns: path (relative to the table's folder, or inside it); optional id, subject, session, contrast and the
    participant's."""
    if not table.is_file():
        raise InputError(f"{table} does not exist; give a folder or a .csv, .tsv or .parquet table")
    if table.suffix == ".parquet":
        try:
            records = pq.read_table(table).to_pylist()
        except pa.ArrowInvalid as error:
            raise InputError(f"{table} is no Parquet table ({str(error).splitlines()[0]})") from None
        rows = [{str(k): "" if v is None else str(v) for k, v in record.items()} for record in records]
    else:
        rows = _rows(table, "\t" if table.suffix == ".tsv" else ",")
    root = table.parent.absolute()
    scans = []
    for number, row in enumerate(rows, start=1):
        text = row.get("path", "")
        if not text or "\0" in text:
            raise InputError(
                f"{table}: row {number} has no usable 'path' (columns: {', '.join(row)}); name the scan's file"
            )
        path = Path(os.path.normpath(root / text))
        inside = path.is_relative_to(root)
        source = path.relative_to(root).as_posix() if inside else Path(text).as_posix()
        name = row.get("id") or source.removesuffix(_split(path.name)[1])
        if not inside or _leaves(root, path):
            sentence = f"its path leads outside {root.name or root}; move the table or the scan"
            scans.append(ScanFile(name, path, source, code="outside_root", sentence=sentence))
        else:
            subject = row.get("subject") or _scan(path, source, name, parse_bids_entities(source), {}).subject
            contrast = row.get("contrast", "")
            scans.append(ScanFile(name, path, source, subject, row.get("session", ""), contrast, _allowed(row)))
    return Found(scans, {})
