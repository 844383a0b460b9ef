"""Safe NIfTI reading and writing; the only file that knows nibabel.

A volume is taken only when the file's bytes prove it: sizes are judged from the header before memory is allocated, a
gzip stream is read to its end (`source_bytes`), what the header says twice must agree. What is wrong has a code and a
sentence. Suffixes are believed less than content.
"""

import gzip
import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import xxhash
from nibabel.spatialimages import HeaderDataError

from brainscale.geometry import spacing_mm
from brainscale_data_prep import affines
from brainscale_data_prep.source_bytes import DEFLATE_MAX_RATIO, MAX_BYTES, Content, Refused, stored_bytes, with_retries

__all__ = ["MAX_BYTES", "Refused", "Scan", "axes_to_ras", "read", "read_shape", "write"]

MAX_AXIS_VOXELS = 4096
MAX_SERIES_BYTES = 64 << 30
"""A series is inflated to its end and not held."""
SCALING_LIMITS = (1e-15, 1e15)
FREE_TEXT_FIELDS = ("unused_str", "data_type", "db_name", "descrip", "aux_file", "intent_name")
RGB_CODES, COMPLEX_CODES = (128, 2304), (32, 1792, 2048)
MAGICS = {348: (b"n+1\0", b"ni1\0"), 540: (b"n+2\0", b"ni2\0")}
END_OF_LINE_MARKS = (b"\r\n\x1a\n", bytes(4))


@dataclass
class Scan:
    """One volume as its file holds it."""

    voxels: np.ndarray
    """(x,y,z), the file's own type and byte order, first axis fastest; read-only."""
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


def read(path: Path, assume_orientation: str = "", frame: int | None = None, min_extent_mm: float = 0.0) -> Scan:
    """Read one .nii, .nii.gz or .hdr/.img volume.

    assume_orientation: where x, y and z point ("RAS", "LPS", …) in a file that does not say; its centre is then put at
    0 mm (warning `assumed_orientation`). frame: which volume of a series is taken, counted from 0 (warning `frame`).
    min_extent_mm: a volume that is thinner along an axis is refused. Raises Refused with a code and a sentence.
    """
    content = Content(stored_bytes(path))
    header = _header(content, path)
    warnings: list[str] = []
    if content.is_gzip != (path.suffix.lower() == ".gz"):
        warnings.append("wrong_suffix")
    pair = header["magic"].item()[:2] == b"ni"
    if pair != path.name.lower().removesuffix(".gz").endswith(".hdr"):
        if pair:
            raise Refused("not_nifti", "its header says that the voxels are in an .img file; name it .hdr, beside that")
        warnings.append("wrong_suffix")
    dtype = _dtype(header)
    shape, num_frames = _shape(header, dtype, frame, warnings)
    affine = _affine(header, shape, assume_orientation, warnings)
    affines.check_extent(affine, shape, min_extent_mm)
    slope, inter = _scaling(header, warnings)
    offset = _offset(header, pair)
    digest = xxhash.xxh3_128(content.stored)
    num_bytes = len(content.stored)
    if pair:
        content.finish(content.at)
        content = Content(stored_bytes(with_retries(lambda: _image_path(path))))
        digest.update(content.stored)
        num_bytes += len(content.stored)
    count = int(np.prod(shape, dtype=object))
    announced = offset + count * num_frames * dtype.itemsize
    content.skip(offset + count * (frame or 0) * dtype.itemsize * (num_frames > 1) - content.at)
    voxels = content.array(count, dtype, announced)
    if num_frames > 1 and not content.is_gzip:
        voxels = voxels.copy()  # a view would keep the whole series in memory
    if content.finish(announced):
        warnings.append("size_mismatch")
    for name in FREE_TEXT_FIELDS:
        if name in header.keys():
            header[name] = b""
    return Scan(
        voxels.reshape(shape, order="F"), slope, inter, affine, header.binaryblock,
        sorted(set(warnings)), digest.hexdigest(), num_bytes,
    )  # fmt: skip


def read_shape(
    path: Path, assume_orientation: str = "", frame: int | None = None, min_extent_mm: float = 0.0
) -> tuple[tuple[int, int, int], np.ndarray]:
    """Shape (x,y,z) and affine from the header alone, under the same rules as `read`. Raises Refused, also for a file
    that is too small for the voxels it announces, so that no lying header decides how large a grid must be."""
    content = Content(stored_bytes(path, limit=1 << 16))
    header = _header(content, path)
    dtype = _dtype(header)
    shape, num_frames = _shape(header, dtype, frame, [])
    affine = _affine(header, shape, assume_orientation, [])
    affines.check_extent(affine, shape, min_extent_mm)
    image = _image_path(path) if header["magic"].item()[:2] == b"ni" else path
    room = image.stat().st_size * (DEFLATE_MAX_RATIO if content.is_gzip or image.suffix.lower() == ".gz" else 1) + 1024
    if math.prod(shape) * num_frames * dtype.itemsize > room:
        raise Refused("truncated", "it is too small for the voxels that its header announces; copy it again")
    return shape, affine


def axes_to_ras(affine: np.ndarray) -> np.ndarray:
    """(3,2) per voxel axis: the world axis (0 right, 1 anterior, 2 superior) nearest to it, and +1 or -1."""
    return nib.orientations.io_orientation(affine).astype(int)


def _image_path(path: Path) -> Path:
    stem = path.name[: len(path.name.lower().removesuffix(".gz").removesuffix(".hdr"))]
    for suffix in (".img", ".img.gz", ".IMG", ".IMG.GZ"):
        if (image := path.with_name(stem + suffix)).exists():
            return image
    raise Refused("truncated", f"there is no {stem}.img or {stem}.img.gz beside it; copy that file too")


# --------------------------------------------------------------------------------------------- the header


def _header(content: Content, path: Path) -> nib.Nifti1Header:
    """The header as it stands; one of Analyze 7.5 as a NIfTI header that gives no orientation."""
    head = content.take(348)
    orders = {length: order for order in ("little", "big") for length in MAGICS if _int(head[:4], order) == length}
    if not orders:
        raise Refused("not_nifti", f"it does not start with a NIfTI header but with {head[:8]!r}; download it again")
    (length, order), *_ = orders.items()
    head += content.take(length - 348)
    if len(head) < length:
        raise Refused("truncated", f"it holds {len(head)} bytes, fewer than a header of {length}; copy it again")
    kind = nib.Nifti1Header if length == 348 else nib.Nifti2Header
    header = kind(head, endianness="<" if order == "little" else ">", check=False)
    magic = header["magic"].tobytes()
    if length == 540 and header["eol_check"].tobytes() not in END_OF_LINE_MARKS:
        raise Refused("not_nifti", "its line ends were converted as if it were text; copy it again in binary mode")
    if magic in MAGICS[length]:
        return header
    if length == 540 or ".hdr" not in path.suffixes:
        raise Refused("not_nifti", f"its magic is {magic!r}, where NIfTI has n+1 or n+2; export it again as NIfTI")
    analyze, header = header, nib.Nifti1Header(endianness=header.endianness)
    for name in ("dim", "datatype", "bitpix", "pixdim", "vox_offset", "scl_slope", "scl_inter"):
        header[name] = analyze[name]  # the rest means something else there, and names the patient
    header["magic"] = b"ni1"
    return header


def _int(four_bytes: bytes, order: str) -> int:
    return int.from_bytes(four_bytes, "little" if order == "little" else "big")


def _dtype(header: nib.Nifti1Header) -> np.dtype:
    code = int(header["datatype"])
    if code in RGB_CODES:
        raise Refused("rgb", "its voxels are colours, not intensities; leave it out of the source")
    if code in COMPLEX_CODES:
        raise Refused("complex", "its voxels are complex numbers; store their magnitude")
    known = nib.nifti1.data_type_codes.dtype
    dtype = np.dtype(known[code]).newbyteorder(header.endianness) if code in known else np.dtype("V0")
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise Refused("unreadable", f"its datatype code {code} is not one that can be read; store it as float32")
    if int(header["bitpix"]) != 8 * dtype.itemsize:
        bits = int(header["bitpix"])
        raise Refused("unreadable", f"its header contradicts itself ({dtype} with {bits} bits); export it again")
    return dtype


def _shape(
    header: nib.Nifti1Header, dtype: np.dtype, frame: int | None, warnings: list[str]
) -> tuple[tuple[int, int, int], int]:
    """Voxels (x,y,z) of a volume, and how many volumes there are."""
    num_axes = int(header["dim"][0])
    if not 1 <= num_axes <= 7:
        raise Refused("not_nifti", f"its header announces {num_axes} axes; export it again")
    axes = [int(n) for n in header["dim"][1 : num_axes + 1]]
    if min(axes) < 1:
        raise Refused("not_nifti", f"its header announces the shape {axes}; export it again")
    while axes and axes[-1] == 1:
        axes.pop()
    num_frames = axes.pop() if len(axes) == 4 else 1
    if num_frames > 1:
        series = f"it is a series of {num_frames} volumes of {' × '.join(map(str, axes))} voxels"
        if frame is None:
            raise Refused("four_d", f"{series}; take one of them with --frame N (from 0), or leave it out")
        if not 0 <= frame < num_frames:
            raise Refused("four_d", f"{series}, and --frame {frame} is not one of 0 to {num_frames - 1}")
        warnings.append("frame")
        while axes and axes[-1] == 1:
            axes.pop()
    if len(axes) != 3:
        raise Refused("not_3d", f"it has the shape {axes}, not that of a volume; leave it out of the source")
    if max(axes) > MAX_AXIS_VOXELS:
        raise Refused(
            "too_large", f"its header announces {axes} voxels; at most {MAX_AXIS_VOXELS} per axis, so crop it"
        )
    x, y, z = axes
    num_bytes = x * y * z * dtype.itemsize
    if num_bytes > MAX_BYTES or num_bytes * num_frames > MAX_SERIES_BYTES:
        limit = MAX_BYTES if num_bytes > MAX_BYTES else MAX_SERIES_BYTES
        raise Refused("too_large", f"its header announces {num_bytes * num_frames} bytes; at most {limit}, so crop it")
    return (x, y, z), num_frames


def _offset(header: nib.Nifti1Header, pair: bool) -> int:
    offset, least = float(header["vox_offset"]), 0 if pair else header.sizeof_hdr
    if not (least <= offset <= MAX_BYTES and offset == int(offset)):
        raise Refused(
            "not_nifti", f"its voxels are said to start at byte {offset:g}, where none can be; export it again"
        )
    return int(offset)


def _scaling(header: nib.Nifti1Header, warnings: list[str]) -> tuple[float, float]:
    """NIfTI: a slope of 0 means no scaling; NaN is written for the same."""
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or np.isnan(slope):
        return 1.0, 0.0
    low, high = SCALING_LIMITS
    if not (low <= abs(slope) <= high and abs(inter) <= high):
        raise Refused("unreadable", f"its intensity scaling is slope {slope}, intercept {inter}; export it again")
    if slope < 0:
        warnings.append("negative_slope")
    return slope, inter


@np.errstate(all="ignore")  # numbers that overflow or are none are refused by name
def _affine(
    header: nib.Nifti1Header, shape: tuple[int, int, int], assume_orientation: str, warnings: list[str]
) -> np.ndarray:
    """The sform where there is one, else the qform; what is odd about them goes to `warnings`."""
    pixdim = np.asarray(header["pixdim"][1:4], float)
    known = nib.nifti1.xform_codes.value_set() - {0}  # nibabel takes another code for 0 too
    has_sform, has_qform = int(header["sform_code"]) in known, int(header["qform_code"]) in known
    qform = _qform(header) if has_qform and affines.are_spacings(pixdim) else None
    if has_sform:
        affine = np.asarray(header.get_sform(), float)
    elif has_qform and qform is not None:
        affine = qform
    elif assume_orientation and not has_qform and affines.are_spacings(pixdim):
        warnings.append("assumed_orientation")
        affine = affines.assumed(pixdim, shape, assume_orientation)
    elif assume_orientation or has_qform:
        what = f"its qform is no rotation, or its voxel size {pixdim.tolist()} mm is none"
        raise Refused("singular_affine", f"{what}; export it again")
    else:
        raise Refused(
            "no_affine",
            "its header gives no orientation (no sform, no qform), so left and right are unknown; "
            "if you know them, say so with --assume-orientation RAS",
        )
    affines.check(affine, qform if has_qform else affine, pixdim, shape, warnings)
    if int(header["xyzt_units"]) & 7 not in (0, 2):
        warnings.append("odd_units")
    return affine


def _qform(header: nib.Nifti1Header) -> np.ndarray | None:
    header = header.copy()
    header["pixdim"][0] = header["pixdim"][0] or 1  # NIfTI: 0 is read as 1; nibabel refuses it
    with suppress(ValueError, HeaderDataError):
        return np.asarray(header.get_qform(), float)
    return None


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
