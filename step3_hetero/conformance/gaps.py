"""Known gaps: what a vendor's backend is known to get wrong, with the reason, case by case."""

from __future__ import annotations

from pathlib import Path

from step3_hetero.backend import Backend
from step3_hetero.conformance.cases import trials
from step3_hetero.conformance.origin import origin
from step3_hetero.errors import ConfigError

FILE = "known_gaps.txt"


def known_gaps(backend: Backend) -> dict[str, str]:
    """Return the reason of each known gap by its case's id, from the file in the package's folder.

    A line is ``case-id  reason``, with blanks or tabs between; lines whose first character other
    than a blank is # are comments. A backend that is a single module has no folder, and no gaps.

    Raises:
        ConfigError: a line has no reason, names no case of the suite, or comes twice.
    """
    path = origin(backend) / FILE
    return read_gaps(path) if path.is_file() else {}


def read_gaps(path: Path) -> dict[str, str]:
    """Read one file of known gaps. See ``known_gaps``."""
    gaps: dict[str, str] = {}
    for number, line in enumerate(_text(path).splitlines(), 1):
        case, *said = line.split(None, 1)[:2] or ["#"]
        if case.startswith("#"):
            continue
        where = f"{path.name}:{number}"
        reason = said[0].strip() if said else ""
        if not reason:
            raise ConfigError(f"{where}: {case!r} has no reason; write: case-id  reason")
        if case not in trials():
            raise ConfigError(f"{where}: {case!r} is no case of the suite; take the line out")
        if case in gaps:
            raise ConfigError(f"{where}: {case!r} comes twice")
        gaps[case] = reason
    return gaps


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as cause:
        line = cause.object[: cause.start].count(b"\n") + 1
        raise ConfigError(f"{path.name}:{line}: not UTF-8; save the file as UTF-8") from cause
