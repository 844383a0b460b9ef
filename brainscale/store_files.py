"""The files of a store beside its arrays: journal, scans.parquet, refused.jsonl, plan.json, COMPLETE.json.

Every file is put in place whole and fsynced, and nothing in one depends on time, host, or the order of work.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from xxhash import xxh3_128, xxh3_128_hexdigest

from brainscale.prep_plan import Plan
from brainscale.settings import InputError

COMPLETE, PLAN, SCANS, REFUSED = "COMPLETE.json", "plan.json", "scans.parquet", "refused.jsonl"

COLUMNS = {
    "row": pa.int64(),
    **dict.fromkeys(("id", "status", "reason", "sentence"), pa.string()),
    "warnings": pa.list_(pa.string()),
    **dict.fromkeys(("source", "source_xxh3_128", "voxels_xxh3_128"), pa.string()),
    **dict.fromkeys(("subject", "session", "contrast", "header_base64"), pa.string()),
    **dict.fromkeys(("affine_source", "affine_stored", "spacing_source_mm_xyz"), pa.list_(pa.float64())),
    "shape_source_xyz": pa.list_(pa.int64()),
    "crop_voxels_xyz": pa.list_(pa.float64()),
    **dict.fromkeys(("cropped_fraction", "scale", "offset", "background_code", "mean", "std"), pa.float64()),
    **dict.fromkeys(("clip_low", "clip_high", "foreground_threshold", "foreground_fraction"), pa.float64()),
    "skull_stripped": pa.bool_(),
    **dict.fromkeys(("foreground_method", "mask_source", "duplicate_of"), pa.string()),
}
"""Columns of scans.parquet; after them comes one string column `participant_<name>` for each name that any scan has."""
REFUSED_KEYS = frozenset({"row", "id", "status", "reason", "sentence", "source"})


class StoreDamage(InputError):
    """A store's files are not what was written: the sentence names the file."""


def to_json(value: Any) -> bytes:
    """JSON with sorted keys; floats read back bit for bit, NaN and infinity are refused."""
    return (json.dumps(value, sort_keys=True, indent=0, allow_nan=False) + "\n").encode()


def write(root: Path, name: str, data: bytes | memoryview, sync_folders: bool = True) -> dict[str, Any]:
    """Put `root/name` in place whole and on disk; returns its size and hash, as COMPLETE.json lists them.

    The temporary name is fixed, since a file has one owner: what a kill leaves behind, the next try replaces. Without
    `sync_folders` a power cut may lose the name, though never leave half a file.
    """
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    with open(partial, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)
    for folder in PurePosixPath(name).parents if sync_folders else ():
        _sync(root / folder)
    return listing(data)


def sync_tree(root: Path) -> None:
    """Make the names of all files and folders below `root` durable."""
    for folder, _, _ in os.walk(root):
        _sync(Path(folder))


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def listing(data: bytes | memoryview) -> dict[str, Any]:
    return {"bytes": len(data), "xxh3_128": xxh3_128_hexdigest(data)}


def read_plan(path: Path) -> Plan:
    """The plan a store was made with. Raises InputError when plan.json is not one."""
    try:
        return Plan.model_validate_json((path / PLAN).read_bytes())
    except ValueError as error:
        raise InputError(
            f"{path / PLAN} is no plan that this version reads ({' '.join(str(error).split())}); "
            "convert again into a new folder"
        ) from None


def ome_multiscales(plan: Plan) -> dict[str, Any]:
    """OME-Zarr 0.5 attributes over (t, z, y, x), t = scan; voxels of native spacing have no unit."""
    if plan.spacing_mm_xyz == "native":
        unit, scale = {}, [1.0, 1.0, 1.0, 1.0]
    else:
        unit, scale = {"unit": "millimeter"}, [1.0, *(float(s) for s in reversed(plan.spacing_mm_xyz))]
    axes = [{"name": "t", "type": "time"}, *({"name": name, "type": "space", **unit} for name in "zyx")]
    level = {"path": "volumes", "coordinateTransformations": [{"type": "scale", "scale": scale}]}
    return {"version": "0.5", "multiscales": [{"name": "volumes", "axes": axes, "datasets": [level]}]}


# ------------------------------------------------------------------------------------------------ journal


def journal_name(shard: int) -> str:
    return f"journal/shard-{shard:06d}.json"


def journal_time(path: Path, shard: int) -> float:
    """When a shard's journal record was written, in seconds since 1970."""
    return (path / journal_name(shard)).stat().st_mtime


def read_journal(path: Path, shard: int) -> dict[str, Any] | None:
    """{"files", "records"} of a shard, or none when it is not recorded, or a file has not the recorded size."""
    try:
        record = json.loads((path / journal_name(shard)).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return record if sizes_match(path, record["files"]) else None


def sizes_match(path: Path, files: dict[str, dict[str, Any]]) -> bool:
    return all((path / name).is_file() and (path / name).stat().st_size == e["bytes"] for name, e in files.items())


# ------------------------------------------------------------------------------------------------ scans


def check_records(records: Sequence[dict[str, Any]], rows: Sequence[int]) -> None:
    """Raises InputError unless there is one record with all its keys for each row, in order."""
    if [record["row"] for record in records] != list(rows):
        raise InputError(f"records must be those of rows {list(rows)}, got {[record['row'] for record in records]}")
    for record in records:
        wanted = REFUSED_KEYS if record["status"] == "refused" else {*COLUMNS, "participant"}
        if wanted != set(record):
            raise InputError(f"record of row {record['row']}: missing or unknown keys {sorted(wanted ^ set(record))}")
    scans_table(records, [])


def scans_table(records: Iterable[dict[str, Any]], participant_names: Sequence[str]) -> pa.Table:
    """The taken scans among the records, as rows of scans.parquet."""
    schema = pa.schema([*COLUMNS.items(), *((f"participant_{name}", pa.string()) for name in participant_names)])
    rows = [
        {name: scan[name] for name in COLUMNS}
        | {f"participant_{name}": scan["participant"].get(name) for name in participant_names}
        for scan in records
        if scan["status"] != "refused"
    ]
    return pa.Table.from_pylist(rows, schema)


Voxels = tuple[str, float, float]
"""What makes two stored volumes equal: the hash of the codes, and the scale and offset that turn them into values."""


def mark_duplicates(records: Iterable[dict[str, Any]], first_id: dict[Voxels, str]) -> None:
    """Taken scans whose voxels equal an earlier one's get its id and a warning; `first_id` (voxels → id) is kept up by
    this call, so that shards can be given one after another."""
    for scan in records:
        if scan["status"] != "refused":
            voxels = scan["voxels_xxh3_128"], scan["scale"], scan["offset"]
            if voxels in first_id:
                scan["warnings"] = [*scan["warnings"], "duplicate_of"]
                scan |= {"duplicate_of": first_id[voxels], "status": "warning"}
            else:
                first_id[voxels] = scan["id"]


def write_tables(path: Path, journal: Sequence[int]) -> None:
    """scans.parquet and refused.jsonl from the journal records of these shards, in row order."""
    names = sorted({name for s in journal for scan in _records(path, s) for name in scan.get("participant", ())})
    tables, first_id = [], {}  # type: ignore[var-annotated]
    for shard in journal:
        records = _records(path, shard)
        mark_duplicates(records, first_id)
        tables.append(scans_table(records, names))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.concat_tables(tables).combine_chunks(), sink, compression="zstd")
    write(path, SCANS, memoryview(sink.getvalue()))
    write_refused(path, journal)


def write_refused(path: Path, journal: Sequence[int]) -> None:
    """refused.jsonl from the journal records of these shards, in row order; all of them in a finished store."""
    refused = (scan for shard in journal for scan in _records(path, shard) if scan["status"] == "refused")
    write(path, REFUSED, "".join(json.dumps(scan, sort_keys=True) + "\n" for scan in refused).encode())


def _records(path: Path, shard: int) -> list[dict[str, Any]]:
    return json.loads((path / journal_name(shard)).read_bytes())["records"]


def read_refused(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / REFUSED).read_text(encoding="utf-8").splitlines()]


def read_column(path: Path, name: str) -> np.ndarray:
    """One column of scans.parquet: numbers (n,), lists of numbers (n, length), strings and lists of strings as objects.

    Raises InputError for a name that is no column, with those that are.
    """
    file = pq.ParquetFile(path / SCANS)
    names = file.schema_arrow.names
    if name not in names:
        raise InputError(f"{path / SCANS} has no column {name!r}; its columns are {', '.join(names)}")
    kind, values = file.schema_arrow.field(name).type, file.read(columns=[name])[name].to_pylist()
    if pa.types.is_string(kind) or kind == pa.list_(pa.string()):
        return np.fromiter(values, dtype=object, count=len(values))
    return np.array(values, dtype=(kind.value_type if pa.types.is_list(kind) else kind).to_pandas_dtype())


# ------------------------------------------------------------------------------------------------ completeness


def write_complete(path: Path, rows: int, grid_zyx: Sequence[int], shards: dict, metadata: Sequence[str]) -> None:
    """The record that ends a conversion: rows, plan hash, grid, every file with size and hash, and its own digest.

    `shards` lists the shard files already; the metadata files are listed here.
    """
    files = shards | {name: listing((path / name).read_bytes()) for name in metadata}
    complete = {"rows": rows, "plan_hash": read_plan(path).hash(), "grid_zyx": list(grid_zyx), "files": files}
    write(path, COMPLETE, to_json(complete | {"digest": xxh3_128_hexdigest(to_json(complete))}))


def read_complete(path: Path) -> dict[str, Any]:
    """The content of COMPLETE.json. Raises InputError for what is no store or no finished one, StoreDamage when the
    file is not as it was written."""
    if not path.is_dir():
        raise InputError(f"{path} is not a folder; give the path of a store made by data_prep/to_zarr.py")
    if not (path / COMPLETE).is_file():
        if not (path / PLAN).is_file():
            raise InputError(f"{path} holds no store (no {COMPLETE}, no {PLAN}); make one with data_prep/to_zarr.py")
        raise InputError(
            f"{path} is not finished (no {COMPLETE}): run data_prep/to_zarr.py again as before to finish it"
        )
    data = (path / COMPLETE).read_bytes()
    try:
        complete = json.loads(data)
        digest = complete.pop("digest")
    except (ValueError, KeyError, AttributeError, TypeError):
        digest = None
    if digest is None or digest != xxh3_128_hexdigest(to_json(complete)):
        raise StoreDamage(
            f"{path / COMPLETE} is damaged (its digest does not match); restore the file or convert again"
        )
    return complete


def file_damage(path: Path, name: str, entry: dict[str, Any], contents: bool) -> str | None:
    """One sentence when a listed file is missing, has another size or (`contents`) another hash."""
    file = path / name
    if not file.is_file():
        return f"{file} is missing"
    if (size := file.stat().st_size) != entry["bytes"]:
        return f"{file} has {size} bytes where {entry['bytes']} were written"
    if contents:
        with open(file, "rb") as stream:
            found = hashlib.file_digest(stream, xxh3_128).hexdigest()
        if found != entry["xxh3_128"]:
            return f"{file} is not what was written (xxh3_128 {found}, {COMPLETE} lists {entry['xxh3_128']})"
    return None


def index_damage(file: Path, rows: range, volumes: int, chunks: int) -> str | None:
    """One sentence when the index of a shard of `volumes` × `chunks` chunks fails its checksum or lacks data of a row.

    The index ends the file: offset and length of each chunk as little-endian uint64 (2⁶⁴−1 for a chunk that was never
    written), then crc32c (Zarr v3 sharding codec).
    """
    index_bytes = 16 * volumes * chunks + 4
    try:
        with open(file, "rb") as stream:
            data_bytes = stream.seek(0, os.SEEK_END) - index_bytes
            stream.seek(data_bytes)
            index = stream.read()
    except OSError as error:
        return f"{file} has no readable index ({error.strerror})"
    if google_crc32c.value(index[:-4]) != int.from_bytes(index[-4:], "little"):
        return f"{file} is damaged: its index does not match its checksum"
    entries = np.frombuffer(index, "<u8", count=2 * len(rows) * chunks).reshape(-1, 2)
    offset, length = entries.T
    outside = (length > data_bytes) | (offset > data_bytes - np.minimum(length, data_bytes))
    if outside.any():
        lost = sorted({rows[at // chunks] for at in np.flatnonzero(outside)})
        return f"{file} is damaged: its index has no data for rows {lost}"
    return None
