"""What several tests share: the optional real data, reduced or full counts, a small phantom store."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # two pytest workers on two cores; read when numpy and torch are imported

import interpreter  # noqa: F401  (before the kernels are imported)
import numpy as np
import pytest
import slurm_cluster
from processes import run_ranks
from slurm_cluster import Cluster

from brainscale import metrics, store
from brainscale.prep_plan import Plan

ROOT = Path(__file__).parent.parent
REAL_DATA = Path(os.environ.get("BRAINSCALE_TEST_DATA", ROOT / "../shared/data"))
FULL = os.environ.get("BRAINSCALE_TEST_FULL") == "1"


def chosen(quick: list, others: list, reduced: int) -> list:
    """Parameters of a test: the quick ones, and the others as slow ones: about `reduced` of them, spread, or all with
    FULL. A case of several parameters is a tuple."""
    others = [one for one in others if one not in quick]
    step = 1 if FULL else -(-len(others) // reduced)
    return [*quick, *(slow(one) for one in others[::step])]


def slow(case: Any) -> Any:
    """A test's parameters as a slow case."""
    return pytest.param(*(case if type(case) is tuple else (case,)), marks=pytest.mark.slow)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real NIfTI files, or a skip that says how to provide it."""
    if not REAL_DATA.is_dir():
        pytest.skip("no real data: set BRAINSCALE_TEST_DATA to a folder with ds002748_2mm and the others")
    return REAL_DATA


TINY_GRID_ZYX = (16, 24, 16)
TINY_CONFIG = """
objective = "mae"
[data]
workers = 1
holdout_fraction = 0.4
[model]
width = 24
depth = 1
heads = 2
patch_voxels_zyx = [8, 8, 8]
[mae]
decoder_width = 12
decoder_depth = 1
decoder_heads = 1
[train]
num_steps = 40
global_batch_volumes = 4
micro_batch_volumes = 4
precision = "fp32"
[optim]
lr = 3e-3
warmup_steps = 2
[checkpoint]
every_steps = 4
[log]
every_steps = 1
holdout_every_steps = 20
holdout_volumes = 2
pictures = 1
[health]
probe_every_steps = 0
"""


def write_tiny_store(
    path: Path,
    scans: int = 10,
    plan: Plan | None = None,
    change: Callable[[dict[str, Any]], None] | None = None,
    paint: Callable[[int, np.ndarray], np.ndarray] | None = None,
) -> Path:
    """A finished store of smooth random blobs on a dark background, two scans per subject, made without NIfTI.

    change: alters each record before it is written. paint: (row, values) → values, alters each volume.
    """
    plan = plan or Plan(grid_voxels_xyz=TINY_GRID_ZYX[::-1], shard_volumes=4)
    store.create(path, plan, TINY_GRID_ZYX, scans)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in TINY_GRID_ZYX), indexing="ij")
    inside = z**2 + y**2 + x**2 < 0.8
    shards = -(-scans // store.shard_volumes(plan, scans))
    for shard in range(shards):
        volumes, cells, records = [], [], []
        for row in store.shard_rows(plan, scans, shard):
            rng = np.random.default_rng(row)
            blob = 500 + 300 * np.cos(3 * x + rng.uniform(0, 6)) * np.cos(4 * y + rng.uniform(0, 6)) + 50 * z
            values = blob + rng.normal(0, 20, inside.shape)
            values = values if paint is None else paint(row, values)
            volume = np.where(inside, values, 0).astype(np.int16)
            volume = (volume // 4 if plan.dtype == "uint8" else volume).astype(plan.dtype)
            values = volume[inside].astype(float)
            grid = [n // plan.foreground_cell_voxels for n in TINY_GRID_ZYX]
            share = inside.reshape(grid[0], 4, grid[1], 4, grid[2], 4).mean((1, 3, 5))
            volumes.append(volume)
            cells.append(np.round(share * 255).astype(np.uint8))
            records.append(
                {
                    "row": row, "id": f"sub-{row // 2:02d}_ses-{row % 2}_T1w", "status": "ok", "reason": "",
                    "sentence": "", "warnings": [], "source": f"sub-{row // 2:02d}/{row}.nii.gz",
                    "source_xxh3_128": f"{row:032x}", "voxels_xxh3_128": f"{row:032x}",
                    "subject": f"sub-{row // 2:02d}", "session": str(row % 2), "contrast": "T1w", "header_base64": "",
                    "affine_source": np.eye(4).reshape(-1).tolist(), "affine_stored": np.eye(4).reshape(-1).tolist(),
                    "spacing_source_mm_xyz": [1.0] * 3, "shape_source_xyz": list(TINY_GRID_ZYX[::-1]),
                    "crop_voxels_xyz": [0.0] * 3, "cropped_fraction": 0.0, "scale": 1.0, "offset": 0.0,
                    "background_code": 0, "mean": values.mean(), "std": values.std(), "clip_low": values.min(),
                    "clip_high": values.max(), "foreground_threshold": 0.0, "foreground_fraction": inside.mean(),
                    "skull_stripped": True, "foreground_method": "nonzero", "mask_source": "",
                    "duplicate_of": "", "participant": {"age": "60"},
                }
            )  # fmt: skip
        for record in records if change else []:
            change(record)
        store.write_shard(path, shard, np.stack(volumes), np.stack(cells), records)
    store.finish(path)
    return path


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of ten small volumes."""
    return write_tiny_store(tmp_path_factory.mktemp("stores") / "tiny")


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config that trains on `tiny_store` within a second."""
    path = tmp_path_factory.mktemp("configs") / "tiny.toml"
    path.write_text(TINY_CONFIG)
    return path


def run_brainscale(
    *arguments: str | Path, ranks: int = 1, code: int | None = 0, timeout_s: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a command as a user would, with `ranks` processes under torchrun if more than one; checks the exit code."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone", "--no-python"]
    command = [sys.executable, "-m", "brainscale", *map(str, arguments)]
    if ranks > 1:
        command = [sys.executable, *torchrun, *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment, cwd=ROOT)
    if code is not None:
        assert done.returncode == code, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here, which takes root: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def losses(run: Path) -> dict[int, float]:
    """Loss of every step of a run."""
    return {step: line["loss"] for step, line in metrics.read(run / "metrics.jsonl").items() if "loss" in line}


def refusal(code: int, *arguments: str | Path) -> str:
    """The one sentence of a command that must fail without a traceback."""
    with tempfile.TemporaryDirectory() as folder:
        text = run_ranks(*arguments, code=code, logs=Path(folder))[0].text
    assert "Traceback" not in text
    sentences = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1, text
    return sentences[0]


@pytest.fixture(scope="session")
def unbroken(tiny_store: Path, tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one rank."""
    run = tmp_path_factory.mktemp("runs") / "unbroken"
    run_brainscale("pretrain", tiny_config, f"data.store={tiny_store}", f"run.dir={run}")
    return run


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A real Slurm of three nodes, or a skip that says why not."""
    with slurm_cluster.running() as cluster:
        yield cluster
