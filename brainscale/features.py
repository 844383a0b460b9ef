"""Features: from volumes of a store, or NIfTI files, to one vector per scan, by a pretrained encoder.

What the encoder is given are exactly the values that it was trained on; volumes of another plan are refused, and NIfTI
files are prepared by the encoder's own plan. Volumes larger than the crops of the training are encoded whole.

Letters: B volumes at once, n volumes in all, N tokens, C width, L layers, D = L × parts × C features, Z Y X voxels.
No DeepSpeed and no Triton.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from brainscale.geometry import Zyx, token_grid
from brainscale.nifti_rows import NiftiRows, prepared
from brainscale.pretrained import Pretrained, open_pretrained
from brainscale.reader import normalisation
from brainscale.settings import InputError
from brainscale.store import Store
from brainscale.store_files import SCANS
from brainscale.stores import Stores
from brainscale_data_prep.discover import ScanFile
from brainscale_data_prep.nifti import Refused

Pooling = Literal["mean", "max", "mean+std"]
POOLINGS: tuple[str, ...] = get_args(Pooling)
MIN_FOREGROUND = 0.1
"""Share of foreground from which a token counts as one of the head or brain, as in the run's own monitors."""
ACTIVATIONS = {"cpu": 1 << 30, "cuda": 8 << 30}
"""Bytes of activations that a batch may need, about, where no batch size is given. Fixed, so that the batch, on which
the last bits of features depend, is the same on every machine."""
MAX_BATCH = 256
SCAN_COLUMNS = {
    "row": pa.int64(),
    **dict.fromkeys(("id", "subject", "session", "contrast"), pa.string()),
    "warnings": pa.list_(pa.string()),
}
PARTICIPANT = "participant_"


def read_normalised(store: Store | Stores | NiftiRows, rows: Sequence[int] | np.ndarray) -> Tensor:
    """(n,Z,Y,X) float32: the values that training reads of these rows, clipped and normalised as the plan says.

    Equal, bit for bit, to what `brainscale_kernels.patch_gather` makes of the stored volumes. Raises IndexError for a
    row that cannot be read, StoreDamage for one that is damaged.
    """
    return _normalised(store, np.asarray(rows), normalisation(store))


def _normalised(store: Any, rows: np.ndarray, numbers: tuple[np.ndarray, ...]) -> Tensor:
    volumes = torch.from_numpy(store.volumes(rows)).float()
    at = np.searchsorted(store.rows, rows)
    scale, offset, low, high = (torch.from_numpy(column[at])[:, None, None, None] for column in numbers)
    return volumes.mul_(scale).add_(offset).clamp_(low, high)


def token_foreground(store: Store | Stores | NiftiRows, rows: Sequence[int] | np.ndarray, patch_zyx: Zyx) -> Tensor:
    """(n,N) float32: share of brain or head in every token, 0..1, as the loader gives it. Raises InputError when the
    store's foreground cells do not divide the patch."""
    cell = store.plan.foreground_cell_voxels
    if any(p % cell for p in patch_zyx):
        raise InputError(
            f"the encoder's patch {patch_zyx} is no multiple of the foreground cell of {cell} voxels; leave out "
            "--foreground-only"
        )
    cells = store.foreground(rows)
    (gz, gy, gx), (cz, cy, cx) = token_grid(store.volume_zyx, patch_zyx), (p // cell for p in patch_zyx)
    shares = cells.reshape(len(cells), gz, cz, gy, cy, gx, cx).mean((2, 4, 6), dtype=np.float32) / np.float32(255)
    return torch.from_numpy(shares.reshape(len(cells), -1))


# ------------------------------------------------------------------------------------------------ from tokens


def pooled(tokens_LBNC: Tensor, pooling: str, inside_BN: Tensor | None = None) -> Tensor:
    """(B,D): mean, largest value, or mean and standard deviation (over N, not N − 1) of each layer's tokens; layer by
    layer, the mean before the deviation. inside_BN: bool, the tokens that count; each volume needs one."""
    weight = torch.ones_like(tokens_LBNC[0, :, :, 0]) if inside_BN is None else inside_BN.to(tokens_LBNC.dtype)
    weight = weight[None, :, :, None]
    if pooling == "max":
        parts = [tokens_LBNC.masked_fill(weight == 0, -torch.inf).amax(2)]
    else:
        mean = tokens_LBNC.mean(2) if inside_BN is None else (tokens_LBNC * weight).sum(2) / weight.sum(2)
        parts = [mean]
        if pooling == "mean+std":
            parts.append((((tokens_LBNC - mean[:, :, None]) ** 2 * weight).sum(2) / weight.sum(2)).sqrt())
    return torch.stack(parts, dim=1).flatten(0, 1).transpose(0, 1).flatten(1)


def feature_names(width: int, layers: Sequence[int], pooling: str) -> list[str]:
    """(D,) names such as layer-1_mean_0: layer, what was taken over its tokens, dimension."""
    return [f"layer{k}_{part}_{i}" for k in layers for part in pooling.split("+") for i in range(width)]


def batch_volumes(pretrained: Pretrained, volume_zyx: Zyx, layers: int, device: torch.device) -> int:
    """Volumes at once: as many as ACTIVATIONS allows, by what one needs at its peak, about (voxels and patches; what a
    block makes of its tokens; kept layers)."""
    width, patch = pretrained.settings.width, pretrained.settings.patch_voxels_zyx
    tokens, voxels = int(np.prod(token_grid(volume_zyx, patch))), int(np.prod(volume_zyx))
    one = 4 * (3 * voxels + tokens * width * (12 + 2 * layers))
    return min(max(ACTIVATIONS[device.type] // one, 1), MAX_BATCH)


# ------------------------------------------------------------------------------------------------ from volumes


def embed(
    pretrained: Pretrained,
    store: Store | Stores | NiftiRows,
    rows: Sequence[int] | np.ndarray,
    layers: Sequence[int] = (-1,),
    pooling: str = "mean",
    foreground_only: bool = False,
    batch: int = 0,
    device: torch.device | str | None = None,
    progress: Callable[[int], object] | None = None,
) -> np.ndarray:
    """(n,D) float32 features of rows, of whole volumes, in the order given.

    layers: -1 is behind the final norm, k the output of block k; several are joined. pooling: one of POOLINGS, over all
    tokens or (foreground_only) those with a foreground share of at least MIN_FOREGROUND. batch: volumes at once, 0: by
    memory. device: where to, the encoder is moved there; none: where it is. progress: told how many more volumes are
    done. Raises InputError for a store of another plan, a row that is not there, or a volume without foreground.
    """
    check_recipe(layers, pooling)
    pretrained.check(store.plan, f"{getattr(store, 'path', 'the store')}")
    rows = np.asarray(rows, dtype=np.int64)
    if len(absent := np.setdiff1d(rows, store.rows)):
        raise InputError(f"row {absent[0]} of the store was refused or does not exist; see its scans.parquet")
    target = torch.device(device) if device is not None else pretrained.encoder.embed.weight.device
    whole = sized(pretrained, store.volume_zyx).to(target).eval()
    size = batch or batch_volumes(whole, store.volume_zyx, len(layers), target)
    numbers, patch = normalisation(store), whole.settings.patch_voxels_zyx
    pieces = [rows[at : at + size] for at in range(0, len(rows), size)]
    features = np.empty((len(rows), len(feature_names(whole.settings.width, layers, pooling))), np.float32)

    def read(piece: np.ndarray) -> tuple[Tensor, Tensor | None]:
        inside = token_foreground(store, piece, patch) >= MIN_FOREGROUND if foreground_only else None
        if inside is not None and not bool(inside.any(1).all()):
            row = piece[int(inside.any(1).int().argmin())]
            raise InputError(f"row {row} has no token of foreground, so no mean over them; leave out --foreground-only")
        return _normalised(store, piece, numbers), inside

    done = 0
    with torch.inference_mode(), ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read, pieces[0]) if pieces else None
        for number, piece in enumerate(pieces):
            assert ahead is not None
            volumes, inside = ahead.result()
            ahead = reader.submit(read, pieces[number + 1]) if number + 1 < len(pieces) else None
            tokens = whole.tokens(volumes.to(target), layers)
            found = pooled(tokens, pooling, None if inside is None else inside.to(target))
            features[done : done + len(piece)] = found.cpu().numpy()
            done += len(piece)
            if progress is not None:
                progress(len(piece))
    return features


def opened(path: str | Path, part: str = "") -> Pretrained:
    """The encoder of a run folder or an export directory. part: "encoder" or "teacher"; none: a run's encoder, or what
    was exported. Raises InputError, also for an export of the other part."""
    pretrained = open_pretrained(path, part or "encoder")
    if part and (held := pretrained.about.get("part")) != part:
        raise InputError(f"{path} is an export of a run's {held}; export its {part}, or leave out --part")
    return pretrained


def choose_device(name: str) -> torch.device:
    """The device that "auto" (a GPU where there is one), "cpu" or "cuda" means. Raises InputError."""
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"got device {name!r}; give auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda was asked for, and torch sees no GPU here; give --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def sized(pretrained: Pretrained, volume_zyx: Zyx) -> Pretrained:
    """The encoder for volumes of this size: itself, or a copy with as many tokens as these have."""
    return pretrained if pretrained.contract.volume_zyx == volume_zyx else pretrained.at(volume_zyx)


def check_recipe(layers: Sequence[int], pooling: str) -> None:
    """Raise InputError for what no features can be made by."""
    if not layers or len({*layers}) < len(layers):
        raise InputError(f"got layers {list(layers)}; give one or more, each once, e.g. -1 for behind the final norm")
    if pooling not in POOLINGS:
        raise InputError(f"got pooling {pooling!r}; give {', '.join(POOLINGS)}")


@dataclass(frozen=True)
class FileFeatures:
    """Features of NIfTI files."""

    scans: list[tuple[int, ScanFile, dict[str, Any]]]
    """(row, file, record of its preparation) of each that could be taken; a row is a place in the list given."""
    features: np.ndarray
    """(n,D) of these."""
    refused: list[tuple[int, ScanFile, Refused]]
    """The others."""


def embed_files(
    pretrained: Pretrained,
    files: Sequence[ScanFile],
    grid_xyz: tuple[int, int, int],
    workers: int = 1,
    batch: int = 0,
    progress: Callable[[int], object] = lambda _: None,
    **recipe: Any,
) -> FileFeatures:
    """Features of NIfTI files, prepared in memory by the encoder's plan on a grid of so many voxels.

    workers: processes that prepare. recipe: layers, pooling, foreground_only and device, as in `embed`.
    """
    x, y, z = grid_xyz
    whole = sized(pretrained, (z, y, x))
    device = torch.device(recipe.get("device") or whole.encoder.embed.weight.device)
    size = batch or batch_volumes(whole, (z, y, x), len(recipe.get("layers", (-1,))), device)
    plan = pretrained.contract.plan
    scans, refused, features = [], [], []
    for piece in _pieces(enumerate(prepared(files, plan, grid_xyz, workers)), size):
        taken = [(row, file, scan) for row, (file, scan) in piece if not isinstance(scan, Refused)]
        refused += [(row, file, scan) for row, (file, scan) in piece if isinstance(scan, Refused)]
        if taken:
            held = NiftiRows(plan, [(file, scan) for _, file, scan in taken])
            features.append(embed(whole, held, held.rows, batch=size, **recipe))
            scans += [(row, file, scan.record) for row, file, scan in taken]
        progress(len(piece))
    return FileFeatures(scans, np.concatenate(features) if features else np.empty((0, 0), np.float32), refused)


def _pieces(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    piece = []
    for item in items:
        piece.append(item)
        if len(piece) == size:
            yield piece
            piece = []
    if piece:
        yield piece


# ------------------------------------------------------------------------------------------------ tables


def store_scans(store: Stores, rows: np.ndarray) -> pa.Table:
    """What a features file says of rows of a store beside features; a store without a participant column has no values
    there."""
    parts = [pq.read_table(one.path / SCANS) for one in store.stores]
    known = [["row", *(name for name in part.column_names if name.startswith(PARTICIPANT))] for part in parts]
    people = pa.concat_tables([part.select(names) for part, names in zip(parts, known)], promote_options="default")
    columns = {name: pa.array(store.column(name).tolist(), kind) for name, kind in SCAN_COLUMNS.items()}
    columns |= {name: people[name] for name in sorted({*people.column_names} - {"row"})}
    return pa.table(columns).take(np.searchsorted(store.rows, rows)).combine_chunks()


def file_scans(found: FileFeatures) -> pa.Table:
    """The same of NIfTI files."""
    names = sorted({name for _, file, _ in found.scans for name in file.participant})
    lines = [
        {"row": row, "id": file.id, "subject": file.subject, "session": file.session, "contrast": file.contrast}
        | {"warnings": record["warnings"]}
        | {PARTICIPANT + name: file.participant.get(name) for name in names}
        for row, file, record in found.scans
    ]
    schema = pa.schema([*SCAN_COLUMNS.items(), *((PARTICIPANT + name, pa.string()) for name in names)])
    return pa.Table.from_pylist(lines, schema)


def table(scans: pa.Table, features: np.ndarray, pretrained: Pretrained, **recipe: Any) -> pa.Table:
    """The rows of a features file: `scans` and a column features, fixed_size_list<float32>[D].

    Its metadata say what made them: encoder, objective, part, step, samples, plan_hash, trained_volume_zyx, and the
    `recipe` (layers, pooling, …), each as text.
    """
    about, contract = pretrained.about, pretrained.contract
    said = {
        "encoder": about.get("source", ""),
        **{name: about.get(name, "") for name in ("objective", "part", "step", "samples")},
        "plan_hash": contract.plan_hash,
        "trained_volume_zyx": list(contract.volume_zyx),
        **recipe,
    }
    column = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1), pa.float32()), features.shape[1])
    metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in said.items()}
    return scans.append_column("features", column).replace_schema_metadata(metadata)
