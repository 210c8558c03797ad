"""What a certificate was made of: digests over the code that was judged and that judged."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from step3_hetero.backend import Backend
from step3_hetero.conformance.calls import SHARED
from step3_hetero.conformance.gaps import package_folder
from step3_hetero.registry import get_backend

SUFFIXES = {".py", ".so", ".json", ".yaml", ".txt"}
"""The files of a backend that can change what it computes, or what is known of it."""

CORE = Path(__file__).resolve().parents[1]

JUDGES = ("case", "cases", "checks", "draws", "exam", "forms", "forms_choice", "guards", "models",
          "routing", "stage_checks", "stages", "tolerance", "trial", "whole_model")  # fmt: skip
"""The modules of this folder that decide what is asked and what passes."""


def digests(backend: Backend) -> dict[str, str]:
    """Return a SHA-256 each of a backend's files, the ops, the reference and the cases."""
    return {
        "backend": _digest(_files(_folders(backend))),
        "ops": _digest([CORE / "ops.py", CORE / "composed.py", CORE / "specs.py"]),
        "reference": _digest(_files([package_folder(get_backend("reference"))])),
        "cases": _digest([Path(__file__).with_name(f"{name}.py") for name in JUDGES]),
    }


def _folders(backend: Backend) -> list[Path]:
    """Return the folders of a backend, of those it borrows from, and of what torch ones share."""
    folders = [package_folder(backend)]
    folders += [package_folder(get_backend(name)) for name in backend.borrows]
    shared = CORE / "backends" / SHARED.rpartition(".")[2]
    ours = (CORE / "backends").resolve()
    if any(folder.parent == ours and folder.name != "reference" for folder in folders):
        folders.append(shared.resolve())
    return folders


def _files(folders: list[Path]) -> list[Path]:
    return [
        path
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.suffix in SUFFIXES and "__pycache__" not in path.parts
    ]


def _digest(files: list[Path]) -> str:
    """Return a digest over names and bytes, each with its length, so that nothing can slip."""
    seen = sha256()
    for path in files:
        content = path.read_bytes()
        seen.update(f"{path.parent.name}/{path.name}:{len(content)}\n".encode())
        seen.update(content)
    return seen.hexdigest()
