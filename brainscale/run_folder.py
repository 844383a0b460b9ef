"""The run folder: who may write it, what it says about itself, and whether a resumed run is still the same run.

RUN/config.toml       effective settings          RUN/holdout/            held-out spectra and pictures
RUN/run.json          machine, versions, data     RUN/reconstruction.json four errors, see holdout.py
RUN/metrics.jsonl     one line per logged step    RUN/report.html         for people
RUN/checkpoints/      see checkpoint.py           RUN/exit.json           how the last process ended
RUN/masks.npz         how often each cell was hidden since the last start
RUN/starts.jsonl      every start within a Slurm job, see restarts.py
"""

import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
import xxhash

from brainscale import provenance, slurm_job
from brainscale.checkpoint_files import TrainState
from brainscale.config import MAY_CHANGE_ON_RESUME, Config
from brainscale.data_settings import Data
from brainscale.distributed import World, broadcast
from brainscale.provenance import write_text
from brainscale.samplers import Order
from brainscale.sampling import held_out
from brainscale.settings import InputError, changed_keys, to_toml
from brainscale.store import Store
from brainscale.stores import Stores, open_stores, store_paths, subjects_of

STARTED_S = time.time()
"""When this process began."""
STORE_PATH = re.compile(r"data\.stores\.\d+\.path")
"""Settings that say where one of several stores lies: it may move, as `data.store` may."""
LEFTOVER_S = 120.0
REFUSED_LISTED = 200
"""Refused scans named in run.json; all of them stand in the store's refused.jsonl."""


class RunBusy(InputError):
    """The run folder cannot be held, or another process is writing it; nothing in it may be touched."""


def open_everywhere(data: Data, world: World) -> Stores:
    """Open the store or stores of a run on every rank; rank 0 alone checks files and tells the others the verdict."""
    paths = store_paths(data)
    if not paths:
        raise InputError(
            "no store given; add data.store=STORE, a folder made by data_prep/to_zarr.py, or several as "
            "'data.stores=[{path=\"STORE\",weight=1},…]'"
        )
    problem: str | None = None
    if world.is_first:
        try:
            open_stores(paths)
        except InputError as error:
            problem = str(error)
    problem = broadcast(problem, world)
    if problem:
        raise InputError(problem)
    return Stores(paths)


def split_rows(store: Store | Stores, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """(training rows, held-out rows); every subject is on one side."""
    held = held_out(subjects_of(store), config.data.holdout_fraction, config.seed)
    return store.rows[~held], store.rows[held]


def data_hash(store: Store | Stores, order: Order) -> str:
    """Names the training rows, their scans, and what is grouped in their order: another value means another order of
    samples."""
    rows = order.rows
    at = np.searchsorted(store.rows, rows)
    scans = zip(rows, store.column("id")[at], store.column("voxels_xxh3_128")[at])
    lines = [f"{row} {scan} {voxels}" for row, scan, voxels in scans]
    if len(order.groups) > 1 or len(order.groups[0].first) < len(rows):
        lines += [f"{g.name} {g.weight} {g.rows.tolist()} {g.first.tolist()}" for g in order.groups]
    return xxhash.xxh3_128_hexdigest("\n".join(lines).encode())


@contextmanager
def locked(run_dir: Path, world: World) -> Iterator[None]:
    """Hold the run folder. Raises RunBusy on every rank when that cannot be.

    A Slurm job that begins again waits LEFTOVER_S for processes of its life before, which may be left on a lost node.
    """
    lock = None
    taken: str | None = None
    if world.is_first:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(run_dir / ".lock", timeout=LEFTOVER_S if slurm_job.restarts() else 0)
            lock.acquire()
        except filelock.Timeout:
            taken = f"{run_dir} is being written by another process; wait for it, or give this run its own run.dir"
        except OSError as error:
            taken = f"{run_dir} cannot be used ({error.strerror}); give another run.dir, or allow access to it"
    taken = broadcast(taken, world)
    if taken:
        raise RunBusy(taken)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def check_resume(saved: TrainState, now: TrainState, allow_change: tuple[str, ...]) -> None:
    """Raises InputError, with the difference, unless only settings that may change have changed."""
    if saved.plan_hash != now.plan_hash and "data" not in allow_change:
        raise InputError(
            f"the checkpoint was trained on a store with preprocessing plan {saved.plan_hash[:8]}, this store has plan "
            f"{now.plan_hash[:8]}; convert with the same plan, or start a new run.dir"
        )
    permitted = (*MAY_CHANGE_ON_RESUME, *allow_change)
    refused = [
        f"{key}: {before} → {after}"
        for key, before, after in changed_keys(completed(saved.config, Config().model_dump(mode="json")), now.config)
        if not any(key == p or key.startswith(f"{p}.") for p in permitted) and not STORE_PATH.fullmatch(key)
    ]
    if refused:
        raise InputError(
            f"settings differ from those of the run being resumed ({'; '.join(refused)}); restore them, choose another "
            "run.dir, or permit it with --allow-change KEY"
        )
    before, after = (state.micro_batch_volumes * state.world_size for state in (saved, now))
    if before != after and now.config["regularizer"]["kind"] != "none" and "regularizer" not in allow_change:
        raise InputError(
            f"the regularizer looks at {after} volumes at once (micro-batch × ranks), and looked at {before} in the "
            f"run being resumed, which is another loss; set train.micro_batch_volumes = {before} // ranks, or permit "
            "it with --allow-change regularizer"
        )
    if saved.data_hash != now.data_hash and "data" not in allow_change:
        raise InputError(
            "the training scans are not those of the run being resumed, so the order of samples would break; use the "
            "same store, choose another run.dir, or permit it with --allow-change data"
        )


def completed(saved: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Saved settings, and the defaults of those that the version which saved them did not have."""
    return defaults | {
        name: completed(value, defaults.get(name, {})) if isinstance(value, dict) else value
        for name, value in saved.items()
    }


def describe(
    run_dir: Path, config: Config, store: Stores, order: Order, held_rows: np.ndarray, world: World, loader: str,
    recomputed: int, attention: dict[str, Any],
) -> None:  # fmt: skip
    """Write config.toml and run.json. loader: which of the loaders feeds the run; recomputed: of how many blocks
    activations are computed again; attention: which kernel and why (`attention.Choice`)."""
    weights = [entry.weight for entry in config.data.stores] or [1.0]
    trained, held = (np.bincount(store.number(rows), minlength=len(weights)) for rows in (order.rows, held_rows))
    write_text(run_dir / "config.toml", to_toml(config))
    about = {
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": provenance.commit(),
        "versions": provenance.versions(),
        "machine": {"cpu": provenance.cpu_name(), "device": device_name(world), **cores()},
        "world_size": world.size,
        "launcher": world.launcher,
        "loader": loader,
        "recomputed_blocks": recomputed,
        "attention": attention,
        "store": {
            "path": ", ".join(store_paths(config.data)),
            "plan": store.plan.model_dump(mode="json"),
            "plan_hash": store.plan_hash,
            "volume_zyx": store.volume_zyx,
            "scans": len(store.rows),
            "subjects": len(set(subjects_of(store).tolist())),
            "contrasts": Counter(store.column("contrast").tolist()),
            "not_skull_stripped": int((~store.column("skull_stripped")).sum()),
            "training_scans": len(order.rows),
            "held_out_scans": len(held_rows),
            "refused": len(store.refused),
            "refused_by_reason": Counter(r["reason"] for r in store.refused),
            "refused_scans": store.refused[:REFUSED_LISTED],
        },
        "stores": [
            {
                "path": path,
                "names_begin_with": prefix,
                "weight": weight,
                "scans": len(one.rows),
                "training_scans": int(training),
                "held_out_scans": int(held_out),
            }
            for path, prefix, weight, one, training, held_out in zip(
                store_paths(config.data), store.prefixes, weights, store.stores, trained, held
            )
        ],
        "order": {
            "sampler": config.data.sampler,
            "block_samples": len(order.rows),
            "groups": [
                {"name": group.name, "scans": len(group.rows), "units": len(group.first), "samples_of_a_block": quota}
                for group, quota in zip(order.groups, order.quotas)
            ],
        },
    }
    write_text(run_dir / "run.json", json.dumps(about, indent=1))


def write_exit(
    run_dir: Path, code: int, sentence: str, world: World, again: bool = False, lost_nodes: Sequence[str] = ()
) -> None:
    """Write exit.json: torchrun hides a rank's exit code, this file does not.

    When one rank fails, the others fail for want of it; the reason written first stays. again, lost_nodes: as in
    `write_record`.
    """
    path = run_dir / "exit.json"
    if world.size > 1 and code in (1, 5) and path.exists() and path.stat().st_mtime > STARTED_S:
        return
    write_record(run_dir, code, sentence, world.rank, again, lost_nodes)


def write_record(
    run_dir: Path, code: int, sentence: str, rank: int = 0, again: bool = False, lost_nodes: Sequence[str] = ()
) -> None:
    """Write exit.json whatever is there. again: another start may do better; lost_nodes: where ranks died or hang."""
    record = {"code": code, "sentence": sentence, "rank": rank, "again": again, "lost_nodes": list(lost_nodes)}
    utc = datetime.now(UTC).isoformat(timespec="seconds")
    write_text(run_dir / "exit.json", json.dumps({**record, "utc": utc}) + "\n")


def cores() -> dict[str, int]:
    """Cores that this process may use, and how many ranks share them."""
    return {"cores": len(os.sched_getaffinity(0)), "ranks": int(os.environ.get("LOCAL_WORLD_SIZE", "1"))}


def device_name(world: World) -> str:
    """The GPU's name, or "cpu" with the number of threads."""
    if world.device.type == "cuda":
        return torch.cuda.get_device_name(world.device)
    return f"cpu ({torch.get_num_threads()} threads)"
