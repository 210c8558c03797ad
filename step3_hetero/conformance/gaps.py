"""Known gaps: what a vendor's backend is known to get wrong, with the reason, case by case."""

from __future__ import annotations

import inspect
from pathlib import Path

from step3_hetero.backend import Backend
from step3_hetero.conformance.cases import trials
from step3_hetero.errors import ConfigError

FILE = "known_gaps.txt"


def package_folder(backend: Backend) -> Path:
    """Return the folder of the package that defines a backend."""
    return Path(inspect.getfile(type(backend))).resolve().parent


def known_gaps(backend: Backend) -> dict[str, str]:
    """Return the reason of each known gap by its case's id, from the file beside the backend.

    A line is ``case-id  reason``; lines that start with # are comments.

    Raises:
        ConfigError: a line has no reason, names no case of the suite, or comes twice.
    """
    path = package_folder(backend) / FILE
    return read_gaps(path) if path.is_file() else {}


def read_gaps(path: Path) -> dict[str, str]:
    """Read one file of known gaps. See ``known_gaps``."""
    gaps: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        case, _, reason = line.strip().partition(" ")
        where = f"{path.name}:{number}"
        if not reason.strip():
            raise ConfigError(f"{where}: {case!r} has no reason; write: case-id  reason")
        if case not in trials():
            raise ConfigError(f"{where}: {case!r} is no case of the suite; take the line out")
        if case in gaps:
            raise ConfigError(f"{where}: {case!r} comes twice")
        gaps[case] = reason.strip()
    return gaps
