"""Where a backend's own code lies: the folder of its package, or its module's file alone."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from step3_hetero.backend import Backend

OURS = "step3_hetero.backends."
"""Our own backends share a package with the core; each is a package inside it."""


def origin(backend: Backend) -> Path:
    """Return the folder of the package that a backend's module belongs to, subpackages and all.

    A backend that is a single module has no folder of its own: its file is returned. Namespaces
    that vendors share (packages without an ``__init__.py``) belong to nobody and are passed over.
    """
    name = type(backend).__module__
    start = len(OURS.split(".")) if name.startswith(OURS) else 1
    parts = name.split(".")
    for end in range(start, len(parts) + 1):
        prefix = ".".join(parts[:end])
        module = sys.modules.get(prefix) or import_module(prefix)
        if file := getattr(module, "__file__", None):
            path = Path(file).resolve()
            return path.parent if hasattr(module, "__path__") else path
    raise AssertionError(f"{name} was imported from no file")
