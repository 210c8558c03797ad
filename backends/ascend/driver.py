"""Whose ``npu`` device this process has: torch_npu's, or a named stand-in's."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

VARIABLE = "STEP3_HETERO_ASCEND_STAND_IN"
"""Names a module, or its folder, whose ``load()`` registers an ``npu`` device that is none. It has
to be set on purpose, is refused beside an installed torch_npu, and shows as the device's tier."""


def stand_in() -> str | None:
    """Return what VARIABLE names, None where it is not set."""
    return os.environ.get(VARIABLE) or None


def why_unavailable() -> str | None:
    """Say why this process has no ``npu`` device, or None when it has one."""
    if find_spec("torch") is None:
        return "torch is not installed; pip install 'step3-hetero[ascend]' (docs/ascend.md)"
    installed = find_spec("torch_npu") is not None
    if stand_in() and installed:
        return f"torch_npu is installed and {VARIABLE} names a stand-in for it: unset the variable"
    if not stand_in() and not installed:
        return "torch_npu is not installed; pip install 'step3-hetero[ascend]' (docs/ascend.md)"
    try:
        library()
    except Exception as cause:  # a driver that is missing shows as anything
        first = (str(cause).splitlines() or [""])[0]
        return f"{stand_in() or 'torch_npu'} does not load: {type(cause).__name__}: {first}"
    return None if count() else "torch_npu finds no device; npu-smi info lists those of the machine"


def library() -> str:
    """Register the ``npu`` device with torch, once; return what it is."""
    return _loaded(stand_in())


@cache
def _loaded(named: str | None) -> str:
    if named is None:
        import_module("torch_npu")
        return "torch_npu"
    return str(_module(named).load())


def _module(named: str) -> ModuleType:
    """Import a module by its name, or a package by its folder."""
    folder = Path(named)
    if not folder.is_dir():
        return import_module(named)
    spec = spec_from_file_location(
        "ascend_stand_in", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{folder} is no package")
    module = module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def module() -> Any:
    """Return ``torch.npu``."""
    import torch

    library()
    return torch.get_device_module("npu")


def count() -> int:
    """Return how many devices there are."""
    return int(module().device_count())


def chip(index: int) -> str:
    """Return the driver's name of a device's chip, as Ascend910B3."""
    return str(module().get_device_name(index))


def memory(index: int) -> tuple[int, int]:
    """Return a device's memory in bytes: (free, total)."""
    free, total = module().mem_get_info(index)
    return int(free), int(total)


def exact_products() -> None:
    """Compute float32 in float32: torch_npu's default for convolutions is HF32."""
    npu = module()
    npu.matmul.allow_hf32 = False
    npu.conv.allow_hf32 = False


def allow_internal_formats() -> None:
    """Let ``npu_format_cast`` make fractal arrays: without this it returns what it is given."""
    module().config.allow_internal_format = True


def library_version() -> str:
    """Return the version of torch_npu, or why there is none."""
    if named := stand_in():
        return f"stand-in for torch_npu ({Path(named).name}), torch {version('torch')}"
    try:
        return f"torch_npu {version('torch_npu')}"
    except PackageNotFoundError:
        return "torch_npu not installed"
