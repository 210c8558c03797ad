"""Choosing configurations on a card: time the candidates of each entry, keep the quickest.

Needs a card; the search itself is tried with made-up times (tests/cuda/test_tuning.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from step3_hetero.backends.cuda import attention, jobs, moe
from step3_hetero.backends.cuda.configurations import Configuration, table, write
from step3_hetero.backends.cuda.linear import Codes, Integers
from step3_hetero.errors import PlacementError
from step3_hetero.specs import CacheSpec

BLOCK_N, BLOCK_K, WARPS, STAGES = (32, 64, 128), (64, 128), (4, 8), (1, 2, 3, 4)
"""What is tried. BLOCK_M stays: it is the heads of a KV head, or what tells gemm's entries apart;
blocks of columns divide the 128 that share a scale."""

RUNS = 10

DO_NOT_FIT = (CompilationError, OutOfResources, PTXASError)
"""What Triton says of a candidate that a card cannot run; anything else ends the search."""

ROWS_OF_TOKENS = jobs.EXPERTS // jobs.TOP_K
"""Tokens for one row an expert."""

Timer = Callable[[Configuration], float]
"""Returns the seconds of a kernel under a configuration; infinity where it cannot run."""


def tuned(entry: Configuration) -> bool:
    """Say whether an entry is worth tuning: attention and products, in what models run in."""
    return entry.kernel in ("attend", "gemm") and "float32" not in entry.numbers


def candidates(entry: Configuration) -> Iterator[Configuration]:
    """Yield an entry and its variations."""
    yield entry
    blocks = dict(entry.blocks)
    depths = BLOCK_K if "BLOCK_K" in blocks else (0,)
    for n, k, warps, stages in itertools.product(BLOCK_N, depths, WARPS, STAGES):
        changed = blocks | {"BLOCK_N": n} | ({"BLOCK_K": k} if k else {})
        found = replace(
            entry, blocks=tuple(sorted(changed.items())), num_warps=warps, num_stages=stages
        )
        if found != entry:
            yield found


def best(entry: Configuration, timer: Timer) -> tuple[Configuration, float]:
    """Return the quickest candidate and its seconds; the entry itself where none is quicker."""
    timed = [(timer(one), number, one) for number, one in enumerate(candidates(entry))]
    seconds, _, found = min(timed)
    return found, seconds


def tune(path: Path, progress: Callable[[str], None]) -> None:
    """Tune every entry of this machine's card; the whole table is in ``path`` after each of them.

    Raises:
        PlacementError: there is no card here.
    """
    if not torch.cuda.is_available():
        raise PlacementError("backend cuda: no NVIDIA card here; tuning times kernels on one")
    major, minor = torch.cuda.get_device_capability()
    arch = 10 * major + minor
    newest = max(e.arch for e in table() if e.arch <= arch)
    card = torch.cuda.get_device_name()
    entries, times = list(table()), {}
    for place, entry in enumerate(entries):
        if entry.arch != newest or not tuned(entry):
            continue
        entries[place], seconds = best(entry, _timer(entry, arch))
        times[f"{entry.kernel} {entry.numbers} {entry.largest}"] = seconds
        write(path, entries, {"card": card, "torch": torch.__version__, "seconds": times})
        said = f"{entry.kernel} {entry.numbers} up to {entry.largest}"
        progress(f"{said}: {seconds * 1e6:.1f} µs")


def _timer(entry: Configuration, arch: int) -> Timer:
    """Return a timer that runs an entry's kernel at Step-3's sizes on this machine's card."""
    work = _attention(entry, arch) if entry.kernel == "attend" else _product(entry, arch)

    def timed(configuration: Configuration) -> float:
        try:
            return _median_s(lambda: work(configuration))
        except DO_NOT_FIT:
            return float("inf")

    return timed


def _median_s(work: Callable[[], Any]) -> float:
    for _ in range(2):
        work()
    times: list[float] = []
    clock: Any = torch.cuda.Event
    for _ in range(RUNS):
        start, end = (clock(enable_timing=True) for _ in range(2))
        start.record(torch.cuda.current_stream())
        work()
        end.record(torch.cuda.current_stream())
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return median(times)


def _attention(entry: Configuration, arch: int) -> Callable[[Configuration], object]:
    place = torch.device("cuda")
    held = {"e4m3": "float8_e4m3fn"}.get(entry.numbers, entry.numbers)
    head_dim = min(entry.largest, jobs.HEAD_DIM)
    spec = CacheSpec(1, head_dim, jobs.DECODING * jobs.CONTEXT // 128, held)
    cache = attention.CudaCache(spec, place, arch)
    batch = attention.Batch(jobs.decoding(1, jobs.DECODING, jobs.CONTEXT), place)
    q = torch.randn(jobs.DECODING, jobs.HEADS, head_dim, device=place).bfloat16()
    return lambda chosen: attention.attention(q, cache, batch, scale=0.0625, chosen=chosen)


def _product(entry: Configuration, arch: int) -> Callable[[Configuration], object]:
    place = torch.device("cuda")
    held = {"bfloat16": "plain"}.get(entry.numbers, entry.numbers)
    tokens = ROWS_OF_TOKENS * min(entry.largest, 256)
    stack = _filled(jobs.stack(arch, torch.bfloat16, held))
    u = torch.randn(tokens, jobs.HIDDEN, device=place).bfloat16()
    picked = [torch.randperm(jobs.EXPERTS)[: jobs.TOP_K] for _ in range(tokens)]
    ids = torch.stack(picked).int().to(place)
    share = torch.full(ids.shape, 1 / jobs.TOP_K, dtype=torch.bfloat16, device=place)
    return lambda chosen: moe.experts(u, share, ids, stack, chosen=chosen)


def _filled(stack: moe.ExpertWeights) -> moe.ExpertWeights:
    """Return the same stack in the card's memory, with numbers of ordinary size."""
    parts: dict[str, Any] = {}
    for name in ("gate", "up", "down"):
        part = getattr(stack, name)
        if isinstance(part, Codes):
            codes = torch.randint(0, 120, part.codes.shape, dtype=torch.uint8, device="cuda")
            parts[name] = Codes(codes, torch.ones(part.scales.shape, device="cuda"))
        elif isinstance(part, Integers):
            parts[name] = Integers(part.codes.shape, torch.device("cuda"))
            parts[name].codes.random_(-127, 128)
            parts[name].scales.fill_(0.01)
        else:
            parts[name] = torch.randn(part.shape, dtype=part.dtype, device="cuda")
    return replace(stack, **parts)
