"""Published lists of ids: read whatever their columns are called, and bring the ids of a cohort into one form.

The same person is "002_S_0295" in one list, "sub-ADNI002S0295" in a BIDS folder and "002S0295" in a file name. What a
cohort's ids look like is in `COHORTS`. Ids that are bare numbers (PPMI, ABIDE) say no cohort: it is taken from the name
of the list's file where that has one, and otherwise left open.
"""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from brainscale.settings import InputError

SUBJECT_COLUMNS = (
    "subject_id", "subject", "participant_id", "participant", "patient_id", "ptid", "naccid", "sub_id", "id",
)  # fmt: skip
SCAN_COLUMNS = ("scan_uid", "scan_id", "image_data_id", "image_id", "image_uid", "mr_id", "scan")
UNKNOWN = frozenset({"", "unknown", "n/a", "na", "nan", "none"})
COHORTS = {
    "ADNI": (r"(\d{3})S(\d{4})(?!\d)",),
    "NACC": (r"NACC(\d{6})(?!\d)",),
    "OASIS": (r"OAS([1-4]\d{4})(?!\d)",),
    "UCSF-PDGM": (r"UCSFPDGM0*(\d+)",),
    "BraTS": (r"BRATS([A-Z]{2,4}\d{5})", r"BRATS20\d\d(\d{5})"),
    "IXI": (r"IXI(\d{3})(?!\d)",),
    "ABIDE": (r"^00((?:28|29|30|50|51)\d{3})$",),
    "PPMI": (r"^PPMI0*(\d+)$",),
}
"""Cohort → patterns of its ids, in upper case without punctuation; groups are what tells subjects apart. UCSF-PDGM is
published with three digits in tables and four in folders; BraTS ids carry a session, which is dropped."""
FILE_NAMES = {**{name: name for name in COHORTS}, "SCAN": "NACC", "OAS": "OASIS", "UCSF": "UCSF-PDGM"}
"""What the name of a list's file may contain → cohort."""

Subject = tuple[str, str]
"""(cohort or "", id in one form)"""


@dataclass(frozen=True)
class IdList:
    """Scans as a list names them; "" where it does not say. Arrays are (n,)."""

    source: str
    subjects: np.ndarray
    scans: np.ndarray
    cohort: str = ""
    """Cohort that the file's name says, for ids that are bare numbers."""
    columns: dict[str, np.ndarray] | None = None
    """All columns of the file, by name in snake case."""

    def names(self) -> list[Subject]:
        """(n,) subjects in one form; ("", "") where none is named."""
        return [subject_name(subject, self.cohort) for subject in self.subjects.tolist()]

    def column(self, name: str) -> np.ndarray | None:
        return (self.columns or {}).get(name)


def read_list(path: str | Path) -> IdList:
    """A .csv or .tsv with a header. Raises InputError, with the columns found, when none of them holds ids."""
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{file}: no such list; give a .csv or .tsv with columns subject_id and scan_uid")
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            header = stream.readline()
            stream.seek(0)
            rows = list(csv.reader(stream, delimiter="\t" if "\t" in header else ","))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{file} is no table of text ({error}); give a .csv or .tsv in UTF-8") from None
    rows = [row for row in rows if any(cell.strip() for cell in row)]
    if len(rows) < 2:
        raise InputError(f"{file} has no rows; give a list with a header and at least one id")
    header_cells, body = rows[0], rows[1:]
    if short := next((at for at, row in enumerate(body, 2) if len(row) != len(header_cells)), None):
        raise InputError(
            f"{file}: row {short} has {len(body[short - 2])} cells where the header has {len(header_cells)}; mend the "
            "table"
        )
    columns = {
        _snake(name): np.array([row[at].strip() for row in body], dtype=str) for at, name in enumerate(header_cells)
    }
    subject = next((name for name in SUBJECT_COLUMNS if name in columns), "")
    scan = next((name for name in SCAN_COLUMNS if name in columns), "")
    if not subject and not scan:
        raise InputError(
            f"{file} has the columns {', '.join(header_cells)}, none of which is known to hold ids; name them "
            "subject_id and scan_uid"
        )
    nothing = np.full(len(body), "", dtype=str)
    return IdList(str(file), _known(columns.get(subject, nothing)), _known(columns.get(scan, nothing)),
                  cohort_of_file(file), columns)  # fmt: skip


def cohort_of_file(path: Path) -> str:
    """The one cohort that a file's name, or else that of its folder, speaks of; "" for none or several."""
    for name in (path.stem, path.parent.name):
        words = set(re.findall(r"[A-Z]+", name.upper()))
        if len(found := {cohort for word, cohort in FILE_NAMES.items() if word.upper().split("-")[0] in words}) == 1:
            return found.pop()
    return ""


def subject_name(text: str, cohort: str = "") -> Subject:
    """A subject's (cohort, id) in one form, e.g. ("ADNI", "002 0295"). cohort: that of bare numbers."""
    if text.lower() in UNKNOWN:
        return "", ""
    bare = re.sub(r"[^A-Z0-9]", "", re.sub(r"^(\d+/)?(SUB-)?", "", text.upper()))
    for name, patterns in COHORTS.items():
        for pattern in patterns:
            if found := re.search(pattern, bare):
                return name, " ".join(found.groups())
    return (cohort, str(int(bare))) if bare.isdecimal() else ("", bare)


def scan_name(text: str) -> str:
    """A scan in one form: the image number of the LONI archive (I119180) where the id holds one, else its letters and
    digits in upper case without the file's ending; "" for none."""
    if text.lower() in UNKNOWN:
        return ""
    if loni := re.search(r"(?:^|[_/-])I(\d{4,8})(?=$|[_./-])", text):
        return f"I{loni[1]}"
    return re.sub(r"[^A-Z0-9]", "", re.sub(r"\.(NII|HDR|IMG)(\.GZ)?$", "", text.upper()))


def same(subject: Subject, others: dict[str, set[str]]) -> bool:
    """Whether a subject is among others (id → its cohorts, see `by_id`). An open cohort may be any."""
    cohorts = others.get(subject[1], set())
    return bool(subject[1]) and bool(cohorts) and (not subject[0] or subject[0] in cohorts or "" in cohorts)


def by_id(subjects: Sequence[Subject]) -> dict[str, set[str]]:
    """id → cohorts in which it occurs; subjects without a name left out."""
    found: dict[str, set[str]] = {}
    for cohort, name in subjects:
        if name:
            found.setdefault(name, set()).add(cohort)
    return found


def _known(values: np.ndarray) -> np.ndarray:
    return np.array(["" if value.lower() in UNKNOWN else value for value in values.tolist()], dtype=str)


def _snake(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.strip().lower()).strip("_")
