"""Rows of .csv, .tsv and .parquet tables as text, and the columns about people that may be taken from them."""

import csv
from collections.abc import Collection, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from brainscale.settings import InputError

PARTICIPANT_COLUMNS = ("age", "sex", "gender", "group", "site", "scanner")
PARTICIPANT_PREFIX = "label_"
MISSING = ("", "n/a", "N/A")


def read(path: Path) -> list[dict[str, str]]:
    """All rows by column name, cells stripped, '' where there is nothing. Raises InputError."""
    try:
        if path.suffix == ".parquet":
            records = pq.read_table(path).to_pylist()
            return [{str(name): _text(cell) for name, cell in record.items()} for record in records]
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="," if path.suffix == ".csv" else "\t", restval=""))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); fetch it, or allow reading it") from None
    except pa.ArrowInvalid as error:
        raise InputError(f"{path} is no Parquet table ({str(error).splitlines()[0]})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a table in UTF-8: {error}") from None
    for number, row in enumerate(rows, start=1):
        if any(row.pop(None, [])):
            raise InputError(f"{path}: row {number} has more cells than the header has columns; mend or quote it")
    return [{name: cell.strip() for name, cell in row.items() if name} for row in rows]


def _text(cell: object) -> str:
    return "" if cell is None or cell != cell else str(cell).strip()  # NaN, pandas' missing value, equals nothing


def allowed(row: Mapping[str, str], columns: Collection[str]) -> dict[str, str]:
    """Cells of the columns that may be taken (and of label_*), by lower-case name; missing values are left out."""
    names = {column.lower() for column in columns}
    return {
        name.lower(): cell
        for name, cell in row.items()
        if (name.lower() in names or name.lower().startswith(PARTICIPANT_PREFIX)) and cell not in MISSING
    }
