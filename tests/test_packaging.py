"""What is installed where there is no network: pins, wheel, wheelhouse, container definitions."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
SLURM = ROOT / "slurm"
SCRIPT = SLURM / "wheelhouse.sh"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def setup_value(name: str) -> ast.expr:
    """An argument of setup(), unevaluated."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"]
    return next(word.value for word in calls[0].keywords if word.arg == name)


def run(*command: str | Path, code: int = 0, timeout_s: float = 60, **environment: str) -> str:
    """Output of a command, both streams, its exit code checked."""
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s, cwd=ROOT,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of brainscale, built from a copy without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("brainscale", "kernels", "data_prep", "slurm"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "-w",
        folder,
        folder,
    )
    return next(folder.glob("*.whl"))


def test_constraints_pin_every_dependency_within_its_range():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    assert len(pins) == len(lines)
    wanted = ast.literal_eval(setup_value("install_requires"))
    for extra in ast.literal_eval(setup_value("extras_require")).values():
        wanted += extra
    assert len(wanted) > 30
    for requirement in map(Requirement, wanted):
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin and requirement.specifier.contains(pin, prereleases=True), f"{requirement}: pinned {pin}"


@pytest.mark.slow
def test_wheel_carries_what_clusters_need_and_runs_from_a_fresh_environment(wheel: Path, tmp_path: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    sources = {path.name for path in [*SLURM.glob("*.sh"), SLURM / "Dockerfile", SLURM / "apptainer.def"]}
    assert "wheelhouse.sh" in sources
    assert {f"brainscale_slurm/{name}" for name in sources} <= names
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-index", "--no-deps", wheel)
    # dependencies come from the environment of the tests (whose .pth files are not read), brainscale from the wheel
    dependencies = {"PYTHONPATH": sysconfig.get_path("purelib")}
    where = run(python, "-P", "-c", "import brainscale; print(brainscale.__path__[0])", **dependencies)
    assert where.startswith(str(tmp_path))
    assert run(tmp_path / "venv/bin/brainscale", "--version", **dependencies).strip()
    text = run(tmp_path / "venv/bin/brainscale", "pretrain", "configs/mae_tiny_cpu.toml", "--dry-run", **dependencies)
    assert "FLOPs of the run" in text


def test_help_and_refused_arguments(tmp_path: Path):
    for arguments in (["--help"], ["make", "--help"], ["install", "-h"]):
        text = run("bash", SCRIPT, *arguments)
        assert text.startswith("usage: wheelhouse.sh make") and "SHA256SUMS" in text
    assert "usage:" in run("bash", SCRIPT, code=2)
    for arguments, sentence in (
        (["make"], "make wants 1 name"),
        (["install", "a"], "install wants 2 name"),
        (["make", "a", "--pyton", "b"], "unknown option --pyton"),
        (["make", "a", "--glibc"], "--glibc wants a value"),
        (["make", "a", "--glibc", "2"], "--glibc 2 is no version"),
        (["make", tmp_path, "--python", "/nonexistent/python"], "/nonexistent/python does not run"),
    ):
        assert f"error: {sentence}" in run("bash", SCRIPT, *arguments, code=2)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def folder(wheel: Path, tmp_path: Path) -> Path:
    """A finished wheelhouse that holds brainscale's wheel alone."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    shutil.copy(wheel, folder)
    shutil.copy(ROOT / "constraints.txt", folder)
    (folder / "requirements.txt").write_text("brainscale-mri\n")
    (folder / "python-version").write_text(f"{PYTHON}\n")
    sums = run("bash", "-c", f"cd {folder} && sha256sum -- *")
    (folder / "SHA256SUMS").write_text(sums)
    return folder


def refused(folder: Path, *more: str) -> str:
    text = run("bash", SCRIPT, "install", folder, folder.parent / "venv", "--python", sys.executable, *more, code=2)
    assert not (folder.parent / "venv").exists()
    return text


def test_a_changed_wheel_is_refused(folder: Path, wheel: Path):
    path = folder / wheel.name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    text = refused(folder)
    assert f"{wheel.name}: FAILED" in text and "was changed or damaged" in text
    path.unlink()
    assert "was changed or damaged" in refused(folder)


def test_a_foreign_or_unfinished_folder_is_refused(folder: Path, wheel: Path):
    stranger = folder / "torch-99-py3-none-any.whl"
    shutil.copy(wheel, stranger)
    assert f"{stranger.name} is not in SHA256SUMS" in refused(folder)
    stranger.unlink()
    (folder / "python-version").write_text("3.10\n")
    (folder / "SHA256SUMS").write_text(run("bash", "-c", f"cd {folder} && sha256sum -- *.* python-version"))
    assert "is for Python 3.10" in refused(folder)
    (folder / "SHA256SUMS").unlink()
    assert "was not finished" in refused(folder)
    assert "is already finished" in run("bash", SCRIPT, "make", finished(folder), code=2)


def finished(folder: Path) -> Path:
    (folder / "SHA256SUMS").touch()
    return folder


def test_containers_are_made_alike():
    docker = (SLURM / "Dockerfile").read_text()
    apptainer = (SLURM / "apptainer.def").read_text()
    bases = re.findall(r"^ARG BASE=(\S+)$", docker, re.M), re.findall(r"^From: (\S+)$", apptainer, re.M)
    assert bases[0] == bases[1] and re.fullmatch(r"nvidia/cuda:13\.[\d.]+-base-ubuntu24\.04", bases[0][0])
    for pattern in (r"apt-get install -y --no-install-recommends (.+?)(?: \\)?$", r"(-c constraints\.txt '.+')$"):
        steps = re.findall(pattern, docker, re.M), re.findall(pattern, apptainer, re.M)
        assert len(steps[0]) == 1 and steps[0] == steps[1]
    assert "[gpu,dali]" in docker
    copied = {name for line in re.findall(r"^COPY (.+) \S+$", docker, re.M) for name in line.split()}
    assert copied == set(re.findall(r"^    (\S+) /opt/brainscale/\1$", apptainer, re.M))
    assert all((ROOT / name).exists() for name in copied)
    assert re.search(r"^USER \d+$", docker, re.M)


def test_containers_keep_compiled_code_in_the_users_folder(tmp_path: Path):
    entry = json.loads(re.search(r"^ENTRYPOINT (.+)$", (SLURM / "Dockerfile").read_text(), re.M)[1])
    environment = (SLURM / "apptainer.def").read_text().split("%environment")[1].split("%runscript")[0]
    shell = ["sh", "-c", environment.replace("/opt/venv/bin:", "") + '\nexec "$@"', "sh"]
    clear = ["env", "-u", "TRITON_CACHE_DIR", "-u", "TORCH_EXTENSIONS_DIR", f"HOME={tmp_path}"]
    for start in (entry, shell):
        code = "import os; print(os.environ['TRITON_CACHE_DIR'], os.environ['TORCH_EXTENSIONS_DIR'])"
        caches = f"{tmp_path}/.cache/brainscale/triton", f"{tmp_path}/.cache/brainscale/torch_extensions"
        assert run(*clear, *start, sys.executable, "-c", code).split() == list(caches)
        assert run(*clear, "TRITON_CACHE_DIR=/scratch/t", *start, sys.executable, "-c", code).split()[0] == "/scratch/t"


@pytest.fixture
def roomy(tmp_path: Path) -> Iterator[Path]:
    """A folder whose gigabytes go when the test ends."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.mark.slow
def test_wheelhouse_installs_without_a_network(roomy: Path):
    run("bash", SCRIPT, "make", roomy / "wheels", "--python", sys.executable, "--extras", "", timeout_s=550)
    cut_off = ["unshare", "--net"]  # as root; elsewhere the script's --no-index has to do
    if not shutil.which("unshare") or subprocess.run([*cut_off, "true"], capture_output=True).returncode:
        cut_off = []
    venv = roomy / "venv"
    text = run(*cut_off, "bash", SCRIPT, "install", roomy / "wheels", venv, "--python", sys.executable, timeout_s=300)
    assert re.search(r"^brainscale \d\S* in ", text, re.M)
    run(venv / "bin/python", "-m", "pip", "check")
    text = run(*cut_off, venv / "bin/brainscale", "pretrain", "configs/mae_tiny_cpu.toml", "--dry-run")
    assert "FLOPs of the run" in text
