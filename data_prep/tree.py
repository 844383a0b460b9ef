"""Files below a folder, known by name alone: which are volumes, which links leave, which names cannot be stored."""

import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from brainscale.settings import InputError

VOLUME_SUFFIXES = (".nii.gz", ".nii", ".hdr.gz", ".hdr")
OTHER_VOLUMES = {
    **dict.fromkeys((".dcm", ".ima", "dicomdir"), "dicom"),
    **dict.fromkeys((".mgz", ".mgh"), "mgz"),
    **dict.fromkeys((".nrrd", ".nhdr"), "nrrd"),
    **dict.fromkeys((".mha", ".mhd"), "metaimage"),
    **dict.fromkeys((".nii.zst", ".nii.bz2", ".nii.xz", ".nii.zip"), "nii in another compression"),
    ".mnc": "minc",
}
"""How volumes end that are not read, and under which name they are counted."""
UNSTORABLE = {"Cc", "Cs", "Zl", "Zp"}
"""Unicode categories: control characters, bytes that are no UTF-8, line and paragraph separators."""


@dataclass(frozen=True)
class Folder:
    source: str
    """Path relative to the root, with '/'; '' is the root."""
    files: dict[str, bool]
    """Name → whether it is a link."""


class Search:
    """Walks from a root; what it meets besides NIfTI files is kept in `skipped` and `leaving`."""

    def __init__(self, root: Path, follow_links: bool):
        """With `follow_links`, linked folders are walked too, after all others, and each real folder once."""
        self.root, self.follow_links = root, follow_links
        self.skipped = Counter[str]()
        """Volumes of other formats, hidden ones and links to folders inside the root, by kind."""
        self.leaving: list[str] = []
        """Links to folders outside the root that were not followed."""
        self._base, self._real_root = os.fspath(root), os.path.realpath(root)

    def leaves(self, source: str) -> bool:
        """Whether a path below the root, its links followed, lies outside it and is not to be followed.

        A git-annex link without content does not: the reader says what it is.
        """
        path = os.path.join(self._base, source)
        if os.path.islink(path) and not os.path.exists(path) and "annex/objects" in os.readlink(path):
            return False
        real = os.path.realpath(path)
        return not self.follow_links and not f"{real}/".startswith(self._real_root.rstrip("/") + "/")

    def volumes(
        self, top: str, enters: Callable[[str], bool], see: Callable[[Folder], None] = lambda folder: None
    ) -> Iterator[tuple[str, str, bool]]:
        """(source, suffix, is a link) of each NIfTI file at or below root/top.

        Hidden folders and those that `enters` denies are left out; `see` is shown every folder before its files and
        its subfolders. Raises InputError for a folder that cannot be listed.
        """
        for folder in self._walk(top, enters):
            see(folder)
            for name, is_link in folder.files.items():
                suffix = split(name)[1]
                if suffix and not name.startswith("."):
                    yield join(folder.source, name), suffix, is_link
                elif kind := "hidden" if suffix else _kind(name, folder.files):
                    self.skipped[kind] += 1

    def _walk(self, top: str, enters: Callable[[str], bool]) -> Iterator[Folder]:
        walked: set[str] = set()
        folders, links = [(top, os.path.realpath(os.path.join(self._base, top)))], list[str]()
        while folders or links:
            if not folders:
                link = links.pop(0)
                folders = [(link, os.path.realpath(os.path.join(self._base, link)))]
            source, real = folders.pop()
            if self.follow_links:
                if real in walked:
                    continue
                walked.add(real)
            files, below = {}, []
            for entry in _list(os.path.join(self._base, source)):
                inner, is_link = join(source, entry.name), entry.is_symlink()
                if not (os.path.isdir(entry.path) if is_link else entry.is_dir()):
                    files[entry.name] = is_link
                elif entry.name.startswith(".") or not enters(inner):
                    continue
                elif not is_link:
                    below.append((inner, f"{real}/{entry.name}"))
                elif self.follow_links:
                    links.append(inner)
                elif self.leaves(inner):
                    self.leaving.append(inner)
                else:
                    self.skipped["folder link"] += 1
            yield Folder(source, files)
            folders += reversed(below)


def _list(path: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"{path} cannot be listed ({error.strerror}); allow reading it or leave it out") from None


def _kind(name: str, beside: dict[str, bool]) -> str:
    """Under which name a volume that is not read is counted; '' for what is no volume, or the image of a .hdr."""
    lower = name.lower()
    if lower.endswith((".img", ".img.gz")):
        stem = name[: lower.rindex(".img")]
        paired = any(stem + header in beside for header in (".hdr", ".hdr.gz", ".HDR"))
        return "" if paired else "img without hdr"
    return next((kind for end, kind in OTHER_VOLUMES.items() if lower.endswith(end)), "")


def join(folder: str, name: str) -> str:
    """A source's path from its folder's."""
    return f"{folder}/{name}" if folder else name


def split(name: str) -> tuple[str, str]:
    """A NIfTI file's name (or path) without its suffix, and the suffix; '' for what is no NIfTI file."""
    lower = name.lower()
    for suffix in VOLUME_SUFFIXES:
        if lower.endswith(suffix):
            return name[: -len(suffix)], name[-len(suffix) :]
    return name, ""


def storable(text: str) -> bool:
    """Whether a name can stand on one line of a UTF-8 file."""
    return text.isprintable() or not UNSTORABLE & set(map(unicodedata.category, text))


def escape(text: str) -> str:
    """The name with each character that is not storable as an escape, such as \\n or \\udcff."""
    return "".join(c if storable(c) else c.encode("unicode_escape").decode() for c in text)
