"""What a user would convert NIfTI files with: this project and its peers, each as it is used, and how to read it back.

A converter writes one volume into a folder that does not exist yet. What it wrote is read back and compared with the
source before it is timed, since the time of a wrong output is worth nothing. Peers are imported where they are used.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
import zarr
from scipy import ndimage

from brainscale import store as stores
from brainscale.geometry import spacing_mm, voxel_to_mm
from brainscale.prep_plan import Plan
from brainscale.settings import InputError
from brainscale_data_prep.discover import ScanFile
from brainscale_data_prep.preprocess import canonical
from brainscale_data_prep.shards import Task, convert_shard

INSTALL = "pip install -e '.[peers]'"
OURS = "brainscale"
NIBABEL_ZARR = "nibabel + zarr-python"
LEAST_CORRELATION = 0.9
"""Of a resampled volume with its source, read by linear interpolation at every third voxel; noise keeps it below 1."""


@dataclass(frozen=True)
class Job:
    """One scan under one plan; peers centre the plan's grid on the scan."""

    scan: ScanFile
    plan: Plan
    grid_xyz: tuple[int, int, int]

    @property
    def path(self) -> str:
        return str(self.scan.path)


class Written(NamedTuple):
    """A converted volume, read back: (x,y,z) values in original units, voxel → RAS mm, and half a storage quantum."""

    values: np.ndarray
    affine: np.ndarray
    half_quantum: float = 0.0


class Converter(NamedTuple):
    """How a volume is converted (timed), and how the result is read back (not timed)."""

    convert: Callable[[Job, Path], Any]
    read: Callable[[Job, Path], Written]
    needs: str = ""
    """A module that may be missing."""


def native() -> dict[str, Converter]:
    """Converters that keep every voxel."""
    return {
        OURS: Converter(convert_ours, read_ours),
        "nifti-zarr, one level": Converter(_nifti_zarr, _read_nifti_zarr, "niizarr"),
        NIBABEL_ZARR: Converter(_nibabel_zarr, _read_zarr),
        "MONAI PersistentDataset, first pass": Converter(_monai, _read_monai, "monai"),
    }


def resampled() -> dict[str, Converter]:
    """Converters that resample to the plan's spacing and cut or pad to its grid."""
    return {
        OURS: Converter(convert_ours, read_ours),
        "nibabel + scipy zoom, order 3 + zarr-python": Converter(_scipy_zoom, _read_zarr),
        "SimpleITK, linear + zarr-python": Converter(_itk("sitkLinear"), _read_zarr, "SimpleITK"),
        "SimpleITK, cubic B-spline + zarr-python": Converter(_itk("sitkBSpline3"), _read_zarr, "SimpleITK"),
        "MONAI PersistentDataset, first pass, linear": Converter(_monai, _read_monai, "monai"),
    }


def missing(converter: Converter) -> str:
    """Why a converter cannot run here; "" when it can."""
    try:
        if converter.needs:
            importlib.import_module(converter.needs)
    except ImportError:
        return f"{converter.needs} is not installed; {INSTALL}"
    return ""


# --------------------------------------------------------------------------------------------- this project


def create_ours(job: Job, out: Path) -> None:
    """The empty store, which a conversion makes once for all its volumes."""
    stores.create(out, job.plan, job.grid_xyz[::-1], 1)


def convert_ours(job: Job, out: Path) -> dict[str, Any]:
    """All that a conversion does for a volume: read and check, prepare, write a shard of one and its journal record,
    each on disk (fsync) before it counts; returns the record. Raises InputError for a scan that is refused."""
    (record,), _ = convert_shard(Task(out, 0, job.plan, job.grid_xyz, range(1), [job.scan]))
    if record["status"] == "refused":
        raise InputError(f"{job.path} is refused ({record['reason']}): {record['sentence']}")
    return record


def read_ours(job: Job, out: Path) -> Written:
    stores.finish(out)
    store = stores.open_store(out)
    scale, offset = (float(store.column(name)[0]) for name in ("scale", "offset"))
    stored = store.volumes([0])[0]
    exact = stored.dtype.kind == "f" or scale == nibabel.load(job.path).dataobj.slope
    affine = np.array(store.column("affine_stored")[0]).reshape(4, 4)
    return Written(stored.T * scale + offset, affine, 0.0 if exact else scale / 2)


# --------------------------------------------------------------------------------------------- without resampling


def _nifti_zarr(job: Job, out: Path) -> None:
    importlib.import_module("niizarr").nii2zarr(job.path, str(out), nb_levels=1)


def _read_nifti_zarr(job: Job, out: Path) -> Written:
    image = nibabel.load(job.path)
    voxels = np.asarray(zarr.open_group(out, mode="r")["0"]).T
    return Written(voxels * float(image.dataobj.slope) + float(image.dataobj.inter), image.affine)


def _nibabel_zarr(job: Job, out: Path) -> None:
    image = nibabel.load(job.path)
    voxels = np.asanyarray(image.dataobj.get_unscaled())
    _write_zarr(out, voxels, image.affine, image.dataobj.slope, image.dataobj.inter)


def _write_zarr(out: Path, voxels: np.ndarray, affine: np.ndarray, slope: float = 1.0, inter: float = 0.0) -> None:
    """zarr-python as it comes (format 3, its own codec), 64³ chunks; (x,y,z), and what places and scales the voxels."""
    attributes = {"affine": np.asarray(affine).tolist(), "slope": float(slope), "inter": float(inter)}
    chunks = tuple(min(64, size) for size in voxels.shape)
    array = zarr.create_array(out, shape=voxels.shape, dtype=voxels.dtype, chunks=chunks, attributes=attributes)
    array[...] = voxels


def _read_zarr(job: Job, out: Path) -> Written:
    array: Any = zarr.open_array(out, mode="r")
    slope, inter = (float(array.attrs[name]) for name in ("slope", "inter"))
    return Written(np.asarray(array) * slope + inter, np.array(array.attrs["affine"]))


# --------------------------------------------------------------------------------------------- with resampling


def _target(job: Job) -> np.ndarray:
    assert job.plan.spacing_mm_xyz != "native"
    return np.array(job.plan.spacing_mm_xyz)


def _scipy_zoom(job: Job, out: Path) -> None:
    """scipy's zoom of the whole scan, then cut and pad around the centre; stored in the file's own type."""
    source = nibabel.load(job.path)
    image = nibabel.as_closest_canonical(source)
    values = image.get_fdata(dtype=np.float32)
    zoomed = ndimage.zoom(values, spacing_mm(image.affine) / _target(job), order=3, grid_mode=True, mode="nearest")
    ratio = np.array(values.shape) / zoomed.shape
    first, take, place = [], [], []
    for size, length in zip(job.grid_xyz, zoomed.shape):
        start = (length - size) // 2
        low, high = max(start, 0), min(start + size, length)
        first.append(start)
        take.append(slice(low, high))
        place.append(slice(low - start, high - start))
    boxed = np.zeros(job.grid_xyz, np.float32)
    boxed[tuple(place)] = zoomed[tuple(take)]
    to_source = np.diag([*ratio, 1.0])
    to_source[:3, 3] = ratio * first + (ratio - 1) / 2
    if source.get_data_dtype().kind in "iu" and source.dataobj.slope == 1:
        boxed = np.rint(boxed).astype(source.get_data_dtype())
    _write_zarr(out, boxed, image.affine @ to_source)


def _itk(interpolator: str) -> Callable[[Job, Path], None]:
    """SimpleITK's resampling onto the RAS grid around the scan's centre, in one call and with one thread."""

    def convert(job: Job, out: Path) -> None:
        import SimpleITK as sitk

        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
        image = sitk.ReadImage(job.path)
        to_ras = np.diag([-1.0, -1.0, 1.0, 1.0])  # ITK's world is LPS
        affine = np.eye(4)
        affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
        affine[:3, 3] = image.GetOrigin()
        turned, affine = canonical(np.broadcast_to(np.int8(0), image.GetSize()), to_ras @ affine)
        step = _target(job) / spacing_mm(affine)
        to_source = np.diag([*step, 1.0])
        to_source[:3, 3] = (np.array(turned.shape) - 1) / 2 - (np.array(job.grid_xyz) - 1) / 2 * step
        affine = affine @ to_source
        grid = to_ras @ affine
        direction = (grid[:3, :3] / _target(job)).ravel().tolist()
        resampled = sitk.Resample(
            image, job.grid_xyz, sitk.Transform(), getattr(sitk, interpolator), grid[:3, 3].tolist(),
            _target(job).tolist(), direction, 0.0, image.GetPixelID(),
        )  # fmt: skip
        _write_zarr(out, sitk.GetArrayViewFromImage(resampled).T, affine)

    return convert


def _monai_transforms(job: Job) -> Any:
    """Load, RAS, and where the plan resamples its spacing (linear) and grid: MONAI's usual chain before training."""
    transforms = importlib.import_module("monai.transforms")
    chain: list[Any] = [
        transforms.LoadImage(image_only=True),
        transforms.EnsureChannelFirst(),
        transforms.Orientation("RAS", labels=None),
    ]
    if job.plan.spacing_mm_xyz != "native":
        chain += [
            transforms.Spacing(job.plan.spacing_mm_xyz, mode="bilinear"),
            transforms.ResizeWithPadOrCrop(job.grid_xyz),
        ]
    return transforms.Compose(chain)


def _monai(job: Job, out: Path) -> Any:
    return importlib.import_module("monai.data").PersistentDataset([job.path], _monai_transforms(job), out)[0]


def _read_monai(job: Job, out: Path) -> Written:
    """The cached tensor; MONAI caches no affine, so that comes from the same transforms run again."""
    return Written(np.asarray(_monai(job, out))[0], np.asarray(_monai_transforms(job)(job.path).affine))


# --------------------------------------------------------------------------------------------- is it right?


def check(job: Job, name: str, written: Written) -> None:
    """Raises AssertionError unless a volume holds the source's values where they belong.

    Native voxels must be equal (float32 rounding and half a quantum apart); resampled ones must correlate with the
    source at the same places, and better than its mirror image does.
    """
    image = nibabel.as_closest_canonical(nibabel.load(job.path))
    source = image.get_fdata(dtype=np.float32)
    if job.plan.spacing_mm_xyz == "native":
        values, affine = canonical(written.values, written.affine)
        first = (np.linalg.inv(affine) @ image.affine)[:3, 3]
        corner = np.rint(first).astype(int)
        assert np.abs(first - corner).max() < 0.01, f"{name}: voxels of {job.path} are moved by {first - corner}"
        assert (corner >= 0).all(), f"{name}: {job.path} is cut"
        box = values[tuple(slice(low, low + size) for low, size in zip(corner, source.shape))]
        assert box.shape == source.shape, f"{name}: {job.path} has {source.shape} voxels, {box.shape} are stored"
        most = written.half_quantum * 1.001 + 1e-6 * np.abs(source).max()
        apart = float(np.abs(box - source).max())
        assert apart <= most, f"{name}: values of {job.path} differ by up to {apart}, at most {most} is right"
        return
    points = np.stack(np.meshgrid(*(np.arange(0, n, 3) for n in written.values.shape), indexing="ij"), axis=-1)
    stored = written.values[::3, ::3, ::3]
    at = voxel_to_mm(np.linalg.inv(image.affine) @ written.affine, points)
    right, mirrored = (
        float(
            np.corrcoef(ndimage.map_coordinates(turned, np.moveaxis(at, -1, 0), order=1).ravel(), stored.ravel())[0, 1]
        )
        for turned in (source, source[::-1])
    )
    assert right > max(LEAST_CORRELATION, mirrored), (
        f"{name}: {job.path} correlates by {right:.3f} with its source and by {mirrored:.3f} with its mirror image"
    )
