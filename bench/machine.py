"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

BYTES = 512 << 20
"""Of each array whose copying and reading is timed: far more than any cache."""

TELLING_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")


def describe() -> dict[str, Any]:
    """Return date, processor, memory bandwidth, versions and how busy the machine is."""
    model, flags = processor()
    read, copy = bandwidth()
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "flags": {name: name in flags for name in TELLING_FLAGS},
        "read_gb_s": round(read / 1e9, 1),
        "copy_gb_s": round(copy / 1e9, 1),
        "load": round(os.getloadavg()[0], 2),
        "torch": version("torch"),
        "python": platform.python_version(),
        "step3_hetero": version("step3-hetero"),
    }


def sentence(machine: dict[str, Any]) -> str:
    """Return the description in a line."""
    has = ", ".join(f"{'' if there else 'no '}{name}" for name, there in machine["flags"].items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores ({has}); memory {machine['read_gb_s']} GB/s "
        f"read, {machine['copy_gb_s']} GB/s copy; load {machine['load']} at the start; "
        f"torch {machine['torch']}"
    )


def processor() -> tuple[str, set[str]]:
    """Return the processor's name and flags, as Linux tells them."""
    found: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    name = found.get("model name", platform.machine())
    family = ", ".join(f"{key} {found[key]}" for key in ("cpu family", "model") if key in found)
    return f"{name} ({family})" if family else name, set(found.get("flags", "").split())


def bandwidth() -> tuple[float, float]:
    """Return bytes a second read by a sum and moved (read and written) by a copy, on all cores."""
    import torch

    source = torch.ones(BYTES // 4)
    target = torch.zeros_like(source)
    return BYTES / _seconds(source.sum), 2 * BYTES / _seconds(lambda: target.copy_(source))


def _seconds(action: Callable[[], Any], runs: int = 7) -> float:
    """Return the median time of an action, after one that does not count."""
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return median(times[1:])
