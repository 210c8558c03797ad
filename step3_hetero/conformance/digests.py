"""What a certificate was made of: digests over the code that was judged and that judged.

Every file counts unless it is left out by name, so that a new one is in from its first day.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from step3_hetero.backend import Backend
from step3_hetero.conformance.calls import SHARED
from step3_hetero.conformance.origin import origin
from step3_hetero.registry import get_backend

CORE = Path(__file__).resolve().parents[1]

OPS = ("ops.py", "composed.py", "specs.py")
"""What an op is: a digest of its own."""

OTHERS = ("backends", "placement", "cli", "evals", "transport", "afd", "api.py")
"""What of the core no verdict depends on: backends have digests of their own; the planner, the
printing of results, model evaluations and roles in other processes take no part in a case."""

AFTERWARDS = ("bisect*.py", "shadow.py", "compare.py", "junit.py", "ops_page.py", "vectors.py",
              "given.py")  # fmt: skip
"""Modules of the suite that look at another run than a certificate's, or at a certificate."""

CACHED = "__pycache__"
"""Written by the interpreter, from files that count themselves."""


def digests(backend: Backend) -> dict[str, str]:
    """Return a SHA-256 each of a backend's files, the ops, the reference and the cases."""
    return {"backend": files_digest(_origins(backend)), **suite_digests()}


def suite_digests() -> dict[str, str]:
    """Return a SHA-256 each of the ops, of the reference, and of all that asks and judges."""
    return {
        "ops": _digest(CORE, [CORE / name for name in OPS]),
        "reference": files_digest([origin(get_backend("reference"))]),
        "cases": _digest(CORE, judges()),
    }


def judges() -> list[Path]:
    """Return the files of the core that decide what is asked and what passes."""
    return [path for path in _files(CORE) if not _is_left_out(path.relative_to(CORE))]


def files_digest(origins: Sequence[Path]) -> str:
    """Return a SHA-256 over all files of some folders (or files), with their places in them."""
    seen = sha256()
    for place in origins:
        seen.update(_digest(place.parent, _files(place)).encode())
    return seen.hexdigest()


def with_shared(origins: Sequence[Path]) -> list[Path]:
    """Return the folders, and that which our own backends on torch share if one of them is ours."""
    ours = (CORE / "backends").resolve()
    uses = any(place.parent == ours and place.name != "reference" for place in origins)
    return [*origins, *([ours / SHARED.rpartition(".")[2]] if uses else [])]


def _origins(backend: Backend) -> list[Path]:
    return with_shared([origin(b) for b in (backend, *map(get_backend, backend.borrows))])


def _is_left_out(path: Path) -> bool:
    if path.parts[0] in OTHERS or str(path) in OPS:
        return True
    return path.parts[0] == "conformance" and any(path.match(name) for name in AFTERWARDS)


def _files(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    found = []
    for folder, subfolders, names in os.walk(place, followlinks=True):  # a checkout has links
        if CACHED in subfolders:
            subfolders.remove(CACHED)
        found += [Path(folder, name) for name in names]
    return sorted(path for path in found if path.is_file())


def _digest(base: Path, files: Sequence[Path]) -> str:
    """Return a digest over places below ``base`` and bytes, with lengths, so nothing can slip."""
    seen = sha256()
    for path in files:
        content = path.read_bytes()
        seen.update(f"{path.relative_to(base).as_posix()}:{len(content)}\n".encode())
        seen.update(content)
    return seen.hexdigest()
