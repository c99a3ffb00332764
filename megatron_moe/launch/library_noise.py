"""Keeps what libraries have to say off the terminal: it goes to a file of the rank."""

from __future__ import annotations

import logging
import logging.handlers
from pathlib import Path

_KEPT_RECORDS = 1000


class LibraryNoise:
    """Takes warnings, and log records of WARNING and above; keeps them until it is told a file."""

    def __init__(self) -> None:
        self._memory = logging.handlers.MemoryHandler(_KEPT_RECORDS, flushLevel=logging.CRITICAL + 1)
        self._memory.setLevel(logging.WARNING)
        logging.captureWarnings(True)
        logging.getLogger().addHandler(self._memory)

    def write_to(self, path: Path) -> None:
        """Append to `path`, which is made with the first record. Its folder must exist by then."""
        target = logging.FileHandler(path, delay=True, encoding="utf-8")
        target.setLevel(logging.WARNING)
        target.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
        root = logging.getLogger()
        root.addHandler(target)
        root.removeHandler(self._memory)
        self._memory.setTarget(target)
        self._memory.close()
