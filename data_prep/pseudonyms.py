"""Names that say nothing: ids, subjects, sessions and paths replaced by keyed hashes (`to_zarr.py --hash-ids`).

A plain hash of "sub-01" is undone by hashing every number; with a secret key it is not (BLAKE2b, RFC 7693, which takes
a key). Who holds the key can compute each name's hash again, nobody else can.
"""

import os
import secrets
from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

from brainscale.settings import InputError
from brainscale_data_prep.discover import ScanFile

KEY_BYTES = 32
HASH_BYTES = 10
"""80 bits: among 10 million names two are equal with a chance of 4 in 10¹¹."""
HIDDEN_SENTENCE = (
    "the reason may name people or files and is not kept; convert this file alone without --hash-ids to read it"
)


def read_key(path: Path) -> bytes:
    """The key of a file, which is made (readable by its owner alone) where there is none.

    Raises InputError for a file that holds no key.
    """
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(KEY_BYTES) + "\n")
    except FileExistsError:
        pass
    text = path.read_text(encoding="ascii", errors="replace").strip()
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise InputError(f"{path} holds no key of {2 * KEY_BYTES} hex digits; give another file, or remove it")
    return key


def pseudonym(key: bytes, kind: str, name: str) -> str:
    """20 hex digits for a name of a kind ("subject", "session", "id" or "source")."""
    return blake2b(f"{kind}\0{name}".encode("utf-8", "surrogateescape"), key=key, digest_size=HASH_BYTES).hexdigest()


def hide(scans: Sequence[ScanFile], key: bytes) -> list[ScanFile]:
    """The same scans in the same order under other names; `path` and `mask`, which are never stored, still tell."""
    return [
        replace(
            scan,
            id=pseudonym(key, "id", scan.id),
            source=pseudonym(key, "source", scan.source),
            subject=f"sub-{pseudonym(key, 'subject', scan.subject)}" if scan.subject else "",
            session=f"ses-{pseudonym(key, 'session', scan.session)}" if scan.session else "",
            mask_source=pseudonym(key, "source", scan.mask_source) if scan.mask_source else "",
            sentence=HIDDEN_SENTENCE if scan.code else "",
        )
        for scan in scans
    ]
