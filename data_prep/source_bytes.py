"""A source file's bytes, read in full and proven: placeholders are named, disks that stumble are asked again, a gzip
stream is inflated to its end, so that its CRC and length are checked, and never beyond what was announced."""

import errno
import gzip
import os
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
from isal.igzip_lib import IsalError
from isal.isal_zlib import _GzipReader  # igzip.open copies every block once more: 10 to 40 % slower

MAX_BYTES = 4 << 30
TRAILING_BYTES = 1 << 20
"""More than this after the voxels means that the header does not describe the file."""
DEFLATE_MAX_RATIO = 1032
"""No deflate stream inflates further (zlib's technical note): a header that declares more is not telling the truth."""
POINTER_MARKS = (b"version https://git-lfs", b"/annex/objects/", b".git/annex/objects/")
TRIES, PAUSE_S = 3, 0.2
TRANSIENT = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.EREMOTEIO, errno.ECONNRESET,
    errno.ENOTCONN, errno.ESHUTDOWN, errno.ENETUNREACH, errno.EHOSTDOWN,
}  # fmt: skip
"""What network file systems say while a server restarts or fails over."""
PIECE_BYTES = 1 << 20

T = TypeVar("T")


class Refused(ValueError):
    """A scan that cannot be taken: `code` for counting, `sentence` for people."""

    def __init__(self, code: str, sentence: str):
        super().__init__(code, sentence)
        self.code, self.sentence = code, sentence


def stored_bytes(path: Path, limit: int = -1) -> bytes:
    """A file's bytes as stored, or the first `limit` of them.

    Raises Refused: `pointer_file`, `empty_file`, `too_large`, or `unreadable` after three tries.
    """
    stored = with_retries(lambda: _read(path, limit))
    if not stored:
        raise Refused("empty_file", "it has 0 bytes; copy or download it again")
    if len(stored) < 1024 and any(stored.startswith(mark) for mark in POINTER_MARKS):
        raise Refused(
            "pointer_file", "it is a git-lfs or git-annex pointer without content; fetch the data (`git lfs pull`)"
        )
    return stored


def with_retries(call: Callable[[], T]) -> T:
    """What `call` returns; while the file system says that it is only out for a moment, it is asked three times."""
    for attempt in range(1, TRIES + 1):
        try:
            return call()
        except OSError as error:
            if error.errno in TRANSIENT and attempt < TRIES:
                time.sleep(PAUSE_S * attempt)
                continue
            tried = f" (tried {TRIES} times)" if error.errno in TRANSIENT else ""
            why = f"{error.strerror or error}{tried}"
            raise Refused("unreadable", f"it cannot be read: {why}; check the disk and its permissions") from None
    raise AssertionError


def _read(path: Path, limit: int) -> bytes:
    if path.is_symlink() and not path.exists():
        if "annex/objects" in os.readlink(path):
            raise Refused(
                "pointer_file", "it is a git-annex link without content; run `datalad get` or `git annex get`"
            )
        raise Refused("unreadable", "it is a link to a file that does not exist; mend the link or remove it")
    if not path.is_file():
        raise Refused("unreadable", "there is no such file, or it is a folder or a pipe; give a file")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_BYTES and limit < 0:
            raise Refused("too_large", f"the file has {size} bytes; at most {MAX_BYTES} are read, so split or crop it")
        return file.read(limit)


class Content:
    """What a file holds, inflated on the way if it is compressed: read once, in order, to its end."""

    def __init__(self, stored: bytes):
        self.stored, self.at = stored, 0
        """The bytes as stored; how many bytes of the content have been read."""
        self.is_gzip = stored[:2] == b"\x1f\x8b"
        self._stream = _GzipReader(stored) if self.is_gzip else None  # type: ignore[arg-type]

    def take(self, num_bytes: int) -> bytes:
        """The next bytes, fewer at the content's end."""
        if self._stream is None:
            piece = self.stored[self.at : self.at + num_bytes]
            self.at += len(piece)
            return piece
        room = bytearray(num_bytes)
        return bytes(room[: self._inflate(memoryview(room))])

    def skip(self, num_bytes: int) -> int:
        """Pass over the next bytes; how many there were."""
        begin = self.at
        if self._stream is None:
            self.at = min(self.at + num_bytes, len(self.stored))
            return self.at - begin
        scratch = memoryview(bytearray(min(num_bytes, PIECE_BYTES)))
        while (left := begin + num_bytes - self.at) and self._inflate(scratch[:left]):
            pass
        return self.at - begin

    def array(self, count: int, dtype: np.dtype, announced: int) -> np.ndarray:
        """The next `count` numbers, (count,) read-only. Raises Refused (`truncated`) before memory is allocated where
        the stored bytes cannot hold the `announced` bytes of the whole content."""
        room = DEFLATE_MAX_RATIO * len(self.stored) + 1024 if self.is_gzip else len(self.stored)
        if announced > room:
            compressed = " compressed" if self.is_gzip else ""
            raise self._too_short(f"{len(self.stored)}{compressed}", announced)
        if self._stream is None:
            numbers = np.frombuffer(self.stored, dtype, count, self.at)
            self.at += numbers.nbytes
            return numbers
        numbers = np.empty(count, dtype)  # numpy asks for huge pages: a third faster than bytes
        if self._inflate(memoryview(numbers.view(np.uint8).data)) < numbers.nbytes:
            raise self._too_short(f"{self.at}", announced)
        numbers.flags.writeable = False
        return numbers

    def finish(self, announced: int) -> int:
        """Read to the end, so that a gzip stream's CRC is checked; the number of bytes beyond those `announced`."""
        self.skip(announced - self.at)
        if self.at < announced:
            raise self._too_short(f"{self.at}", announced)
        more = self.skip(TRAILING_BYTES + 1)
        if more > TRAILING_BYTES:
            raise Refused(
                "too_large", f"it goes on after the {announced} bytes that its header announces; write it again"
            )
        return more

    def _too_short(self, held: str, announced: int) -> Refused:
        return Refused(
            "truncated",
            f"it holds {held} bytes where its header announces {announced}; copy or download it again",
        )

    def _inflate(self, target: memoryview) -> int:
        """Fill `target` as far as the stream goes; how far."""
        done = 0
        with _stream_errors():
            while done < len(target) and (got := self._stream.readinto(target[done : done + (1 << 30)])):  # type: ignore
                done += got
        self.at += done
        return done


@contextmanager
def _stream_errors() -> Iterator[None]:
    try:
        yield
    except EOFError:
        raise Refused("truncated", "its gzip stream ends too early; copy or download it again") from None
    except (gzip.BadGzipFile, zlib.error, IsalError) as error:  # type: ignore[misc]
        raise Refused("gzip_crc", f"its gzip stream is damaged ({error}); copy or download it again") from None
