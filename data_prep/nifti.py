"""Safe NIfTI reading and writing; the only file that knows nibabel.

A volume is taken only when the file's bytes prove it: the gzip stream is inflated to its end, so that its CRC and
length are checked (nibabel stops before them); sizes are judged from the header before memory is allocated; what is
wrong has a code and a sentence. Suffixes are believed less than content.
"""

import gzip
import io
import os
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import xxhash
from isal import igzip
from isal.igzip_lib import IsalError
from nibabel.spatialimages import HeaderDataError

from brainscale.geometry import spacing_mm, voxel_to_mm

MAX_AXIS_VOXELS = 4096
MAX_BYTES = 4 << 30
TRAILING_BYTES = 1 << 20
DEFLATE_MAX_RATIO = 1032
"""No deflate stream inflates further (zlib's technical note): a header that declares more is not telling the truth."""
SPACING_LIMITS_MM = (0.01, 100.0)
FREE_TEXT_FIELDS = ("data_type", "db_name", "descrip", "aux_file", "intent_name")
RGB_CODES, COMPLEX_CODES = (128, 2304), (32, 1792, 2048)
POINTER_MARKS = (b"version https://git-lfs", b"/annex/objects/", b".git/annex/objects/")


class Refused(ValueError):
    """A scan that cannot be taken: `code` for counting, `sentence` for people."""

    def __init__(self, code: str, sentence: str):
        super().__init__(code, sentence)
        self.code, self.sentence = code, sentence


@dataclass
class Scan:
    """One volume as its file holds it."""

    voxels: np.ndarray
    """(x,y,z), the file's own type and byte order, first axis fastest; a view of the bytes read."""
    slope: float
    inter: float
    """value = voxel × slope + inter."""
    affine: np.ndarray
    """4×4, voxel (i,j,k) → RAS mm."""
    header: bytes
    """348 (NIfTI-1) or 540 (NIfTI-2) bytes, free-text fields blanked."""
    warnings: list[str]
    source_xxh3_128: str
    """Hash of the file's bytes as stored (a pair: header, then image)."""
    bytes_read: int


# --------------------------------------------------------------------------------------------- reading


def read(path: Path, assume_orientation: str = "", frame: int | None = None) -> Scan:
    """Read one .nii, .nii.gz or .hdr/.img volume. Raises Refused with a code and a sentence."""
    stored = _file_bytes(path)
    header = _header(_inflate(stored, 540, to_end=False), path)
    warnings: list[str] = []
    if _is_gzip(stored) != (path.suffix == ".gz"):
        warnings.append("wrong_suffix")
    pair = header["magic"].item()[:2] == b"ni"
    if pair != (path.name.removesuffix(".gz").endswith(".hdr")):
        if pair:
            raise Refused("not_nifti", "its header says that the voxels are in an .img file, but it is named .nii")
        warnings.append("wrong_suffix")
    shape, dtype = _shape(header), _dtype(header)
    offset, voxel_bytes = _offset(header, pair), int(np.prod(shape)) * dtype.itemsize
    affine = _affine(header, shape, warnings)
    slope, inter = _scaling(header)
    digest = xxhash.xxh3_128(stored)
    num_bytes = len(stored)
    if pair:
        stored = _file_bytes(_image_path(path))
        digest.update(stored)
        num_bytes += len(stored)
    content = _inflate(stored, offset + voxel_bytes, to_end=True)
    if len(content) < offset + voxel_bytes:
        raise Refused("truncated", f"it holds {len(content)} bytes where its header announces {offset + voxel_bytes}")
    voxels = np.frombuffer(content, dtype, count=int(np.prod(shape)), offset=offset).reshape(shape, order="F")
    for name in FREE_TEXT_FIELDS:
        if name in header.keys():
            header[name] = b""
    return Scan(voxels, slope, inter, affine, header.binaryblock, sorted(set(warnings)), digest.hexdigest(), num_bytes)


def read_shape(path: Path) -> tuple[tuple[int, int, int], np.ndarray]:
    """Shape (x,y,z) and affine from the header alone. Raises Refused."""
    stored = _file_bytes(path, limit=1 << 16)
    header = _header(_inflate(stored, 540, to_end=False), path)
    shape = _shape(header)
    return shape, _affine(header, shape, [])


def axes_to_ras(affine: np.ndarray) -> np.ndarray:
    """(3,2) per voxel axis: the world axis (0 right, 1 anterior, 2 superior) nearest to it, and +1 or -1."""
    return nib.orientations.io_orientation(affine).astype(int)


def _is_gzip(stored: bytes) -> bool:
    return stored[:2] == b"\x1f\x8b"


def _file_bytes(path: Path, limit: int = -1) -> bytes:
    if path.is_symlink() and not path.exists():
        target = os.readlink(path)
        if "annex/objects" in target:
            raise Refused(
                "pointer_file", "it is a git-annex link without content; run `datalad get` or `git annex get`"
            )
        raise Refused("unreadable", "it is a link to a file that does not exist")
    if not path.is_file():
        raise Refused("unreadable", "there is no such file, or it is a folder or a pipe")
    try:
        size = path.stat().st_size
        if size > MAX_BYTES and limit < 0:
            raise Refused("too_large", f"the file has {size} bytes; at most {MAX_BYTES} are read")
        with path.open("rb") as file:
            stored = file.read(limit)
    except OSError as error:
        raise Refused("unreadable", f"it cannot be read: {error.strerror or error}") from None
    if not stored:
        raise Refused("empty_file", "it has 0 bytes")
    if len(stored) < 1024 and any(stored.startswith(mark) for mark in POINTER_MARKS):
        raise Refused(
            "pointer_file", "it is a git-lfs or git-annex pointer without content; fetch the data (`git lfs pull`)"
        )
    return stored


def _image_path(path: Path) -> Path:
    stem = path.name.removesuffix(".gz").removesuffix(".hdr")
    for suffix in (".img", ".img.gz"):
        if (image := path.with_name(stem + suffix)).exists():
            return image
    raise Refused("truncated", f"there is no {stem}.img or {stem}.img.gz beside it")


def _inflate(stored: bytes, num_bytes: int, to_end: bool) -> bytes:
    """The first `num_bytes` of the content, whether compressed or not; `to_end` also checks the gzip trailer."""
    if not _is_gzip(stored):
        if to_end and len(stored) > num_bytes + TRAILING_BYTES:
            raise Refused("too_large", f"it has {len(stored)} bytes where its header announces {num_bytes}")
        return stored
    if num_bytes > DEFLATE_MAX_RATIO * len(stored) + 1024:
        raise Refused("truncated", f"{len(stored)} compressed bytes cannot hold the {num_bytes} its header announces")
    try:
        with igzip.IGzipFile(fileobj=io.BytesIO(stored)) as stream:
            content = stream.read(num_bytes)
            if to_end and len(stream.read(TRAILING_BYTES + 1)) > TRAILING_BYTES:
                raise Refused("too_large", f"it inflates to more than the {num_bytes} bytes its header announces")
            return content
    except EOFError:
        raise Refused("truncated", "its gzip stream ends too early") from None
    except (gzip.BadGzipFile, zlib.error, IsalError) as error:  # type: ignore[misc]
        raise Refused("gzip_crc", f"its gzip stream is damaged ({error}); copy or download it again") from None


# --------------------------------------------------------------------------------------------- the header


def _header(head: bytes, path: Path) -> nib.Nifti1Header:
    sizes = {int.from_bytes(head[:4], order) for order in ("little", "big")}
    if 348 in sizes:
        kind, length = nib.Nifti1Header, 348
    elif 540 in sizes:
        kind, length = nib.Nifti2Header, 540
    else:
        raise Refused("not_nifti", f"it does not start with a NIfTI header (its first bytes are {head[:8]!r})")
    if len(head) < length:
        raise Refused("truncated", f"it holds {len(head)} bytes, fewer than a header of {length}")
    header = kind(head[:length], endianness="<" if int.from_bytes(head[:4], "little") == length else ">", check=False)
    if header["magic"].item()[:3] not in (b"n+1", b"ni1", b"n+2", b"ni2"):
        if ".hdr" in path.suffixes:
            raise Refused("no_affine", "it is an Analyze 7.5 header, which does not say where left and right are")
        raise Refused("not_nifti", f"its magic is {header['magic'].item()!r}, where NIfTI has n+1 or n+2")
    return header


def _shape(header: nib.Nifti1Header) -> tuple[int, int, int]:
    num_axes = int(header["dim"][0])
    if not 1 <= num_axes <= 7:
        raise Refused("not_nifti", f"its header announces {num_axes} axes")
    axes = [int(n) for n in header["dim"][1 : num_axes + 1]]
    if min(axes) < 1:
        raise Refused("not_nifti", f"its header announces the shape {axes}")
    while axes and axes[-1] == 1:
        axes.pop()
    if len(axes) == 4:
        raise Refused("four_d", f"it is a series of {axes[3]} volumes (shape {axes}); split it and give one")
    if len(axes) != 3:
        raise Refused("not_3d", f"it has the shape {axes}, not that of a volume")
    if max(axes) > MAX_AXIS_VOXELS:
        raise Refused("too_large", f"its header announces {axes} voxels; at most {MAX_AXIS_VOXELS} per axis are read")
    x, y, z = axes
    return x, y, z


def _dtype(header: nib.Nifti1Header) -> np.dtype:
    code = int(header["datatype"])
    if code in RGB_CODES:
        raise Refused("rgb", "its voxels are colours, not intensities")
    if code in COMPLEX_CODES:
        raise Refused("complex", "its voxels are complex numbers; store their magnitude")
    known = nib.nifti1.data_type_codes.dtype
    dtype = np.dtype(known[code]).newbyteorder(header.endianness) if code in known else np.dtype("V0")
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise Refused("unreadable", f"its datatype code {code} is not one that can be read")
    if int(header["bitpix"]) != 8 * dtype.itemsize:
        raise Refused("unreadable", f"its header contradicts itself: {dtype} with {int(header['bitpix'])} bits")
    if int(np.prod([int(n) for n in header["dim"][1:4]])) * dtype.itemsize > MAX_BYTES:
        raise Refused("too_large", f"its header announces more than {MAX_BYTES} bytes")
    return dtype


def _offset(header: nib.Nifti1Header, pair: bool) -> int:
    offset, least = float(header["vox_offset"]), 0 if pair else header.sizeof_hdr
    if not (least <= offset <= MAX_BYTES and offset == int(offset)):
        raise Refused("not_nifti", f"its voxels are said to start at byte {offset:g}, inside the header or nowhere")
    return int(offset)


def _scaling(header: nib.Nifti1Header) -> tuple[float, float]:
    """NIfTI: a slope of 0 means no scaling; NaN is written for the same."""
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or np.isnan(slope):
        return 1.0, 0.0
    if not (np.isfinite(slope) and np.isfinite(inter)):
        raise Refused("unreadable", f"its intensity scaling is slope {slope}, intercept {inter}")
    return slope, inter


def _affine(header: nib.Nifti1Header, shape: tuple[int, int, int], warnings: list[str]) -> np.ndarray:
    """The sform where there is one, else the qform; what is odd about them goes to `warnings`."""
    pixdim = np.asarray(header["pixdim"][1:4], float)
    has_sform, has_qform = int(header["sform_code"]) > 0, int(header["qform_code"]) > 0
    if not (has_sform or has_qform):
        raise Refused("no_affine", "it has neither sform nor qform, so left and right are unknown")
    pixdim_ok = bool(np.isfinite(pixdim).all() and (pixdim > 0).all())
    qform = None
    if has_qform and pixdim_ok:
        header = header.copy()
        header["pixdim"][0] = header["pixdim"][0] or 1  # NIfTI: 0 is read as 1; nibabel refuses it
        with suppress(ValueError, HeaderDataError):
            qform = header.get_qform()
    affine = header.get_sform() if has_sform else qform
    if affine is None:
        raise Refused("singular_affine", f"its qform is no rotation, or its voxel size {pixdim.tolist()} is none")
    affine = np.asarray(affine, float)
    if not np.isfinite(affine).all():
        raise Refused("singular_affine", "its affine holds numbers that are not finite")
    spacing = spacing_mm(affine)
    low, high = SPACING_LIMITS_MM
    if not ((spacing > low) & (spacing < high)).all():
        raise Refused("singular_affine", f"its affine has voxels of {_mm(spacing)} mm")
    directions = affine[:3, :3] / spacing
    if abs(np.linalg.det(directions)) < 0.05:
        raise Refused("singular_affine", "two axes of its affine point the same way")
    sheared = np.abs(directions.T @ directions - np.eye(3)).max() > 1e-3
    if sheared:
        warnings.append("sheared")
    if not pixdim_ok or (not sheared and np.abs(pixdim / spacing - 1).max() > 0.01):
        warnings.append("bad_pixdim")
    elif has_sform and has_qform:
        corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape])).reshape(3, 8).T
        if qform is None or np.abs(voxel_to_mm(affine, corners) - voxel_to_mm(qform, corners)).max() > 0.1:
            warnings.append("qform_sform_conflict")
    return affine


def _mm(lengths: np.ndarray) -> str:
    return " × ".join(f"{length:.4g}" for length in lengths)


# --------------------------------------------------------------------------------------------- writing


def write(path: Path, voxels: np.ndarray, affine: np.ndarray, slope: float = 1.0, inter: float = 0.0) -> None:
    """Write (x,y,z) voxels as NIfTI-1 (.nii or .nii.gz); the same arguments give the same bytes.

    value = voxel × slope + inter; the affine maps voxels to RAS mm (stored as sform, and as qform if it has no shear).
    """
    header = nib.Nifti1Header()
    header.set_data_dtype(voxels.dtype)
    header.set_data_shape(voxels.shape)
    header.set_sform(affine, code=1)
    directions = affine[:3, :3] / spacing_mm(affine)
    if np.abs(directions.T @ directions - np.eye(3)).max() < 1e-6:
        header.set_qform(affine, code=1)
    else:
        header["pixdim"][1:4] = spacing_mm(affine)
    header.set_slope_inter(slope, inter)
    header.set_xyzt_units("mm")
    header["magic"], header["vox_offset"] = b"n+1", 352
    content = header.binaryblock + bytes(4) + voxels.astype(header.get_data_dtype()).tobytes(order="F")
    path.write_bytes(gzip.compress(content, compresslevel=1, mtime=0) if path.suffix == ".gz" else content)
