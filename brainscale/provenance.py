"""Which code and which machine made a result, and writing it down in one step."""

import os
import platform
import shutil
import subprocess
import uuid
from importlib.metadata import version
from pathlib import Path

NAMES = ("brainscale-mri", "torch", "deepspeed", "numpy", "zarr", "tensorstore", "nibabel")


def versions() -> dict[str, str]:
    """Versions of what decides numbers and speed."""
    return {name: version(name) for name in NAMES}


def cpu_name() -> str:
    """The processor's name as Linux gives it, or its architecture."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str:
    """Commit of the checkout this package is imported from; "" outside one, and where there is no git (a container)."""
    if shutil.which("git") is None:
        return ""
    folder = str(Path(__file__).parent)
    done = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step, so that no reader sees half of it; several processes may do so at once."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
