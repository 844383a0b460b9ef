"""The house: import order, one door per dependency, no __init__.py in side folders, README links and tree."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PREFIX = {"kernels": "brainscale_kernels", "data_prep": "brainscale_data_prep", "slurm": "brainscale_slurm"}
ORDER = [
    *(f"brainscale_kernels.{name}" for name in (
        "launch", "patch_gather", "pixel_loss", "spectrum", "spectral_volume", "spectral_patch", "compile_report",
    )),
    *(f"brainscale.{name}" for name in (
        "settings", "prep_plan", "data_settings", "monitor_settings", "config", "faults", "slurm_job", "stopping",
        "geometry", "schedules", "phases", "distributed", "rendezvous", "provenance", "store_files", "store", "stores",
    )),
    *(f"brainscale_data_prep.{name}" for name in (
        "source_bytes", "affines", "nifti", "tree", "tables", "bids", "discover", "intensity", "foreground",
        "resampling", "preprocess", "pool", "ownership", "pseudonyms", "shards", "convert", "estimate", "verify",
        "export", "severity", "effects", "anatomy", "scanners", "cohort_files", "effect_report", "phantom",
        "nifti_copy", "planting", "planted_dataset",
    )),
    *(f"brainscale.{name}" for name in (
        "sampling", "samplers", "augment", "reader", "stream", "masking", "ops", "feed", "workers", "loader",
        "dali_source", "dali_loader", "layers", "vit", "model_counts", "attention", "regularizers", "mae", "teacher",
        "jepa", "objective", "optim", "zero", "hardware", "plan_states", "plan_memory", "plan_recompute",
        "plan_time", "plan", "plan_text", "engine",
        "checkpoint_files", "encoder_files", "pretrained",
        "nifti_rows", "features", "volume_embedder",
        "checkpoint", "nonfinite", "trackers", "metrics",
        "run_disk", "preflight",
        "run_folder", "step_profile", "phase_table", "profiling", "out_of_memory",
        "restarts", "watch", "holdout", "health",
        "scores", "linear_models", "probes", "online_probe", "session", "monitoring", "train", "figures",
        "pages", "qc_scans", "qc_figures", "qc", "report_health", "score_file", "evaluation_words",
        "evaluation_figures", "report_evaluation", "report_comparison", "run_doctor", "report", "report_compare",
        "doctor",
        "replay",
        "task_settings", "tasks", "id_lists", "split_files", "splits", "acquisition", "split_lint", "contamination",
        "resampling", "intervals", "permutations", "few_shot", "power",
        "baselines", "small_cnn", "fit", "deep_probes",
        "evaluation_settings", "parts", "contestants", "site_leakage", "pipelines", "task_scores", "evaluate",
        "comparison", "seed_intervals", "compare",
        "export_formats", "export",
    )),
    "brainscale_slurm.submit",
    *(f"brainscale.{name}" for name in (
        "cli_phantom",
        "cli_data", "cli_embed", "cli_export", "cli_bench_lines", "cli_bench_step", "cli_bench", "cli_runs",
        "cli_splits", "cli_evaluate",
        "cli_plan", "cli_slurm", "cli",
    )),
    "brainscale.__main__",
    "brainscale_data_prep.to_zarr",
]  # fmt: skip
DOORS = {
    "triton": {"kernels"},
    "deepspeed": {"brainscale/engine.py", "brainscale/checkpoint.py"},
    "zarr": {"brainscale/store.py"},
    "tensorstore": {"brainscale/store.py"},
    "nibabel": {"data_prep/nifti.py"},
    "nilearn": {"data_prep/phantom.py"},
    "nvidia": {"brainscale/dali_loader.py"},
    "submitit": {"slurm"},
}


def sources() -> dict[str, Path]:
    """Import name → file of every module of the project."""
    files = {}
    for folder in ("brainscale", "kernels", "data_prep", "slurm"):
        for path in sorted((ROOT / folder).glob("*.py")):
            if path.stem != "__init__":
                files[f"{PREFIX.get(folder, folder)}.{path.stem}"] = path
    return files


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module imported, at top level?) of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        found += [(name, node.col_offset == 0) for name in names]
    return found


def test_every_module_has_its_place_in_the_order():
    assert set(sources()) == set(ORDER)


def test_imports_point_one_way():
    backward = [
        f"{module} imports {name}"
        for module, path in sources().items()
        for name, _ in imports(path)
        if name in ORDER and ORDER.index(name) >= ORDER.index(module)
    ]
    assert not backward


def test_only_the_commands_import_inside_functions():
    allowed = {
        "brainscale.cli",
        "brainscale.cli_data",
        "brainscale.cli_phantom",
        "brainscale.cli_embed",
        "brainscale.cli_export",
        "brainscale.cli_bench",
        "brainscale.cli_bench_lines",
        "brainscale.cli_bench_step",
        "brainscale.cli_runs",
        "brainscale.cli_plan",
        "brainscale.cli_slurm",
        "brainscale.cli_splits",
        "brainscale.cli_evaluate",
        "brainscale.__main__",
        "brainscale_data_prep.to_zarr",
    }
    inner = [
        f"{module}: {name}"
        for module, path in sources().items()
        for name, top in imports(path)
        if not top and module not in allowed and name != "torch" and not name.startswith("torch.")
    ]
    assert not inner


@pytest.mark.parametrize("package", DOORS)
def test_one_door_per_dependency(package):
    doors = DOORS[package]
    outside = [
        str(path.relative_to(ROOT))
        for path in sources().values()
        if any(name.split(".")[0] == package for name, _ in imports(path))
        and not ({str(path.relative_to(ROOT)), path.parent.name} & doors)
    ]
    assert not outside


@pytest.mark.parametrize("folder", PREFIX)
def test_side_folders_have_no_init(folder):
    """With one, `import kernels` hides the well-known package of that name and an editable install fails."""
    assert not (ROOT / folder / "__init__.py").exists()


def test_conversion_workers_import_nothing_heavy():
    heavy = ("torch", "deepspeed", "nilearn")
    code = f"import sys, brainscale_data_prep.convert; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_trust_boundary_is_crossed():
    """Nothing unpickles, evaluates or runs a shell line."""
    patterns = (
        r"weights_only=False|pickle\.load|yaml\.load\(|(?<!\.)\beval\(|\bexec\(|shell=True|extractall\(|import pickle"
    )
    hits = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in sources().values()
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(patterns, line)
    ]
    assert not hits


def test_readme_links_exist():
    for text in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text.read_text(encoding="utf-8")):
            assert (ROOT / link).exists(), f"{text.name} links to {link}"


def test_readme_tree_names_every_module():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [path.name for path in sources().values() if path.name not in readme and path.stem != "__main__"]
    assert not missing
