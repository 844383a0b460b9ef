"""Finished pieces of long work, so that the same command goes on after whatever ended it."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from brainscale.provenance import write_text
from brainscale.settings import InputError


class Parts:
    """Pieces in a folder, each under the hash of all that it depends on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: dict[str, Any], make: Callable[[], Any]) -> Any:
        """The piece of a key, made where it is not there yet; what comes back went through JSON either way.

        Raises InputError for a file that is no piece.
        """
        text = json.dumps(key, sort_keys=True)
        path = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
        if not path.is_file():
            write_text(path, json.dumps({"key": key, "value": make()}))
        try:
            return json.loads(path.read_text(encoding="utf-8"))["value"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged ({type(error).__name__}); remove it and run the same again") from None
