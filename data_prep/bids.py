"""What BIDS says of names and tables: suffixes, entities, labels; participants, sessions and scans; brain masks."""

import difflib
import os
import posixpath
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from bids2table import parse_bids_entities  # type: ignore[import-untyped]
from bidsschematools.schema import load_schema

from brainscale.settings import InputError
from brainscale_data_prep import tables
from brainscale_data_prep.tree import Folder, Search

BIDS_SUFFIXES = ("T1w", "T2w", "FLAIR", "PDw", "inplaneT2")
"""Selected by default; an earlier one is the reference of a subject's brain mask."""
NOT_ANATOMICAL = {
    **dict.fromkeys(("dseg", "probseg", "mask", "defacemask"), "a segmentation or mask"),
    **dict.fromkeys(("bold", "cbv", "boldref", "sbref", "events"), "functional"),
    **dict.fromkeys(("dwi", "dwiref"), "diffusion-weighted"),
    **dict.fromkeys(("asl", "m0scan"), "perfusion-weighted"),
    **dict.fromkeys(("epi", "fieldmap", "phasediff", "phase1", "phase2"), "a field map"),
    **dict.fromkeys(("magnitude", "magnitude1", "magnitude2"), "part of a field map"),
    "pet": "a PET image",
}
"""Suffixes that are never an anatomical image, and what they are."""

ANATOMICAL = tuple(
    sorted(
        {name for rule in load_schema().rules.files.raw.anat.values() for name in rule.suffixes} - set(NOT_ANATOMICAL)
    )
)
"""Suffixes that the BIDS schema has for images of datatype anat."""
LABEL = re.compile(r"[A-Za-z0-9]+")


def is_dataset(root: Path) -> bool:
    """Whether a folder is a BIDS dataset, raw or derivative."""
    return os.path.lexists(root / "dataset_description.json")


def check_suffixes(suffixes: Collection[str]) -> None:
    """Raises InputError for a suffix that the BIDS schema does not have."""
    known = {suffix["value"] for suffix in load_schema().objects.suffixes.values()}
    if not suffixes:
        raise InputError(f"no suffix was given; name some of {', '.join(ANATOMICAL)}")
    for suffix in suffixes:
        _check_known("suffix", suffix, known, ANATOMICAL)


def check_entities(entities: Iterable[str]) -> None:
    """Raises InputError for an entity that the BIDS schema does not have."""
    known = {entity["name"] for entity in load_schema().objects.entities.values()}
    for entity in entities:
        _check_known("entity", entity, known, sorted(known))


def _check_known(kind: str, name: str, known: Collection[str], shown: Sequence[str]) -> None:
    if name not in known:
        by_case = {other.lower(): other for other in sorted(known)}
        near = [by_case[match] for match in difflib.get_close_matches(name.lower(), by_case, n=1)]
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(f"{name!r} is no BIDS {kind}{hint}; known are {', '.join(shown)}")


def name_fault(source: str, entities: Mapping[str, str]) -> str:
    """What is wrong with a scan's subject or session label (one sentence), or ''. `source` begins with sub-*/."""
    folders = source.split("/")[:-1]
    for key, depth in (("sub", 0), ("ses", 1)):
        folder = folders[depth] if len(folders) > depth and folders[depth].startswith(f"{key}-") else ""
        label = folder.removeprefix(f"{key}-") or entities.get(key, "")
        if (folder or label) and not LABEL.fullmatch(label):
            return f"its label {key}-{label} has other characters than letters and digits; rename it, or use a table"
        if folder and entities.get(key) != label:
            return f"its folder says {folder} and its name does not; rename one of them"
    return ""


# --------------------------------------------------------------------------------------------- people


class People:
    """participants.tsv, sub-*_sessions.tsv and *_scans.tsv of a dataset, restricted to the allowed columns.

    Where they give the same column, a scan's value goes before a session's, and that before a participant's.
    """

    def __init__(self, search: Search, columns: Collection[str]):
        self._search, self._columns = search, columns
        self._values: dict[str, dict[str, str]] = {}

    def read(self, folder: Folder) -> None:
        """Take the tables that a folder holds. Raises InputError."""
        place = folder.source
        for name in folder.files:
            if not name.endswith(".tsv"):
                continue
            if not place:
                if name == "participants.tsv":
                    self._take(name, "participant_id", "", "sub-")
            elif name == f"{place}_sessions.tsv":
                self._take(f"{place}/{name}", "session_id", f"{place}/", "ses-")
            elif name == f"{place.replace('/', '_')}_scans.tsv":
                self._take(f"{place}/{name}", "filename", f"{place}/", "")

    def of(self, subject: str, session: str, source: str) -> dict[str, str]:
        """What is known of a scan, by column."""
        keys = (subject, f"{subject}/{session}", source)
        return {name: cell for key in keys for name, cell in self._values.get(key, {}).items()}

    def _take(self, table: str, column: str, place: str, prefix: str) -> None:
        path = self._search.root / table
        if path.is_symlink() and self._search.leaves(table):
            raise InputError(f"{path} links to a place outside the source; copy it inside, or give --follow-links")
        seen: dict[str, dict[str, str]] = {}
        for row in tables.read(path):
            name = row.get(column) or ""
            if not name:
                raise InputError(f"{path} has a row without {column} (columns: {', '.join(row)}); fill or remove it")
            values = tables.allowed(row, self._columns)
            key = posixpath.normpath(place + prefix + name.removeprefix(prefix))
            if seen.setdefault(key, values) != values:
                raise InputError(f"{path} describes {name} twice and differently; keep one row for each")
        self._values |= {key: values for key, values in seen.items() if values}


# --------------------------------------------------------------------------------------------- brain masks


class Masks:
    """Brain masks (suffix mask, desc-brain or label-brain) of a dataset and of its derivatives, indexed by entities.

    A mask belongs to scans of the same entities, space and resolution included, desc and label apart. One that names
    no space lies on the voxels of the subject's reference contrast: of several raw contrasts, only the first in
    BIDS_SUFFIXES is given it. Processed scans (with space or desc) share their grid whatever their contrast.
    """

    def __init__(self, pipeline: str):
        """`pipeline`: the only derivatives/NAME whose masks are taken; "none", or "" for any and those beside a scan,
        which go first."""
        self._pipeline = pipeline
        self._sources: dict[frozenset[tuple[str, str]], dict[str, list[str]]] = {}
        self._contrasts: dict[frozenset[tuple[str, str]], set[str]] = {}

    def add(self, source: str, entities: Mapping[str, str], pipeline: str) -> None:
        """Index a file of `pipeline` ('' for the dataset itself) if it is a brain mask, else note its contrast."""
        if entities.get("datatype") != "anat" or "sub" not in entities:
            return
        suffix, kinds = entities.get("suffix", ""), {entities[key] for key in ("desc", "label") if key in entities}
        if suffix == "mask" and kinds == {"brain"}:
            if self._pipeline in ("", pipeline):
                self._sources.setdefault(_grid(entities), {}).setdefault(pipeline, []).append(source)
        elif not pipeline:
            self._contrasts.setdefault(_grid(entities), set()).add(suffix)

    def of(self, source: str, entities: Mapping[str, str]) -> str:
        """The mask of a scan of the dataset, or ''. Raises InputError where several fit equally well."""
        grid, rank = _grid(entities), _rank(entities.get("suffix", ""))
        found = self._sources.get(grid, {})
        if not found or "sub" not in entities:
            return ""
        if not {"space", "desc"} & set(entities) and any(
            _rank(other) < rank for other in self._contrasts.get(grid, ())
        ):
            return ""
        masks = found.get("") or [mask for pipeline in sorted(found) for mask in found[pipeline]]
        if len(masks) > 1:
            raise InputError(
                f"{source} has several brain masks ({', '.join(masks)}); keep one, or name the pipeline whose masks "
                "count (--masks PIPELINE, or none)"
            )
        return masks[0]

    def add_derivatives(self, search: Search) -> None:
        """Index the masks of derivatives/PIPELINE/sub-*/[ses-*/]anat. Raises InputError for an unknown pipeline."""
        folders = [path.name for path in sorted(search.root.glob("derivatives/[!.]*")) if path.is_dir()]
        inside = [name for name in folders if not search.leaves(f"derivatives/{name}")]
        if self._pipeline not in ("", "none", *inside):
            raise InputError(
                f"{search.root} has no derivatives/{self._pipeline} of its own to take masks from; "
                f"there is: {', '.join(inside) or 'none'}"
            )
        for name in {"": inside, "none": []}.get(self._pipeline, [self._pipeline]):
            derived = Search(search.root, search.follow_links)
            for source, _, _ in derived.volumes(f"derivatives/{name}", _holds_anat):
                if "_mask." in source:
                    self.add(source, parse_bids_entities(source), name)
            search.skipped["folder link"] += len(derived.leaving) + derived.skipped["folder link"]
        search.skipped["folder link"] += len(folders) - len(inside)


def _holds_anat(folder: str) -> bool:
    """Whether derivatives/PIPELINE/... is a subject, one of its sessions, or their folder anat."""
    subject, *below = folder.split("/")[2:]
    kinds = ["ses" if name.startswith("ses-") else name for name in below]
    return subject.startswith("sub-") and kinds in ([], ["ses"], ["anat"], ["ses", "anat"])


def _grid(entities: Mapping[str, str]) -> frozenset[tuple[str, str]]:
    return frozenset(item for item in entities.items() if item[0] not in ("desc", "label", "suffix", "ext"))


def _rank(suffix: str) -> int:
    return BIDS_SUFFIXES.index(suffix) if suffix in BIDS_SUFFIXES else len(BIDS_SUFFIXES)
