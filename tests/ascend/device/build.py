"""Build the stand-in device once: a shared library beside the repository's other build products."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("device.cpp")
FOLDER = Path(__file__).resolve().parents[3] / "build" / "ascend-device"


def library() -> Path:
    """Return the library's path, built if this source was not yet built for this torch.

    Raises:
        RuntimeError: there is no C++ compiler, or it refuses the source.
    """
    import torch

    text = SOURCE.read_text(encoding="utf-8") + torch.__version__
    built = FOLDER / f"npu-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    if not built.is_file():
        _compile(built)
    return built


def _compile(target: Path) -> None:
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise RuntimeError("no C++ compiler (g++, or what CXX names): the stand-in is not built")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(f".{os.getpid()}.partial")
    abi = int(torch._C._GLIBCXX_USE_CXX11_ABI)
    command = [
        compiler, "-std=c++20", "-O1", "-fPIC", "-shared", "-w", f"-D_GLIBCXX_USE_CXX11_ABI={abi}",
        *(f"-isystem{path}" for path in include_paths()), str(SOURCE), "-o", str(temporary),
        *(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
    temporary.replace(target)
