"""Is this store whole, and what is in it: the sentences that `brainscale doctor` prints of stores."""

from collections import Counter
from pathlib import Path

from brainscale.settings import InputError
from brainscale.store import Store, damage
from brainscale.store_files import COMPLETE, PLAN


def is_run(path: Path) -> bool:
    """Whether this is a run folder, and no store. Raises InputError when it is neither."""
    if any((path / name).exists() for name in (COMPLETE, PLAN)):
        return False
    if (path / "config.toml").is_file() and any((path / name).is_file() for name in ("run.json", "metrics.jsonl")):
        return True
    raise InputError(
        f"{path} is neither a store nor a run; give a folder made by data_prep/to_zarr.py, or one that `brainscale "
        "pretrain` wrote"
    )


def check_store(path: Path, deep: bool) -> list[str]:
    """What is wrong with a store, one sentence per problem, none for a healthy one; `deep` reads everything.

    Raises InputError when the path holds no finished store.
    """
    if not path.is_dir() or not any((path / name).exists() for name in (COMPLETE, PLAN)):
        raise InputError(f"{path} holds no store; give a folder made by data_prep/to_zarr.py")
    if not (path / COMPLETE).exists():
        raise InputError(f"{path} is not finished (it has no {COMPLETE}); run to_zarr.py again with the same arguments")
    return damage(path, deep)


def describe_store(path: Path) -> str:
    """What a healthy store holds, in a few lines: scans, refusals by reason, warnings by code, grid, spacing, size."""
    store = Store(path)
    plan, (z, y, x) = store.plan, store.volume_zyx
    if plan.spacing_mm_xyz == "native":
        spacing = "each scan's own spacing"
    else:
        spacing = f"{' × '.join(f'{s:g}' for s in plan.spacing_mm_xyz)} mm"
    warnings = Counter(code.partition(":")[0] for codes in store.column("warnings") for code in codes)
    refused = Counter(scan["reason"] for scan in store.refused)
    return "\n".join(
        (
            f"{path}: {len(store.rows)} scans, {store.num_bytes / 1e6:.1f} MB, plan {store.plan_hash}",
            f"grid {x} × {y} × {z} voxels (x, y, z) at {spacing}, {plan.dtype} in {plan.codec}",
            f"refused: {len(store.refused)}{_by_code(refused)}",
            f"warnings: {warnings.total()}{_by_code(warnings)}",
        )
    )


def _by_code(counts: Counter[str]) -> str:
    return f" ({', '.join(f'{code} {n}' for code, n in sorted(counts.items()))})" if counts else ""
