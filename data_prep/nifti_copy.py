"""A copy of a NIfTI file with other voxels: header, extensions and every other byte stay as they were."""

import gzip
import struct
from pathlib import Path

import numpy as np

from brainscale_data_prep.nifti import MAX_BYTES, Refused
from brainscale_data_prep.source_bytes import TRAILING_BYTES, Content, stored_bytes

VOX_OFFSET = {348: (108, "f"), 540: (168, "q")}
"""Length of the header → where it says at which byte the voxels begin, and as what (struct)."""


def copy_with_voxels(source: Path, dest: Path, voxels: np.ndarray) -> None:
    """Write `source`, a .nii or .nii.gz that `nifti.read` takes, to `dest` with other voxels (x,y,z) of the same type
    and byte order. The same arguments give the same bytes. Raises Refused (`unreadable`) for a .hdr/.img pair and for
    a series.
    """
    content = Content(stored_bytes(source))
    plain = bytearray(content.take(MAX_BYTES + TRAILING_BYTES if content.is_gzip else len(content.stored)))
    order = "<" if struct.unpack_from("<i", plain)[0] in VOX_OFFSET else ">"
    place, kind = VOX_OFFSET[struct.unpack_from(f"{order}i", plain)[0]]
    begin = int(struct.unpack_from(order + kind, plain, place)[0])
    end = begin + voxels.nbytes
    if begin < 348 or len(plain) < end or len(plain) - end > TRAILING_BYTES:
        raise Refused("unreadable", "it is a series, or its voxels lie in another file; write it as one .nii.gz")
    plain[begin:end] = voxels.tobytes(order="F")
    compressed = dest.suffix.lower() == ".gz"
    dest.write_bytes(gzip.compress(plain, compresslevel=1, mtime=0) if compressed else plain)
