"""Starting a kernel: compiled where its tensors lie on a card, interpreted where on the host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from step3_hetero.backends.cuda.configurations import Configuration

_ASSUMED_ARCH: ContextVar[int] = ContextVar("assumed_arch", default=90)
"""Whose configurations kernels take whose tensors are on no card."""


@dataclass(frozen=True)
class Launch:
    """One start of a kernel: what it was given, and how."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: Mapping[str, Any]
    configuration: Configuration | None


_RECORDED: ContextVar[list[Launch] | None] = ContextVar("recorded", default=None)


@contextmanager
def recording(arch: int) -> Iterator[list[Launch]]:
    """Note launches instead of making them, as a card of ``arch`` would: nothing is computed.

    For tensors of the device ``meta``, which have shapes and no memory.
    """
    launches: list[Launch] = []
    recorded, assumed = _RECORDED.set(launches), _ASSUMED_ARCH.set(arch)
    try:
        yield launches
    finally:
        _RECORDED.reset(recorded)
        _ASSUMED_ARCH.reset(assumed)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    configuration: Configuration | None = None,
    **constants: Any,
) -> None:
    """Run ``kernel`` on every program of ``grid``; an empty grid is no launch.

    Where the first tensor lies decides how: only a device opened with ``interpret`` has tensors in
    host memory. A configuration brings block sizes, warps and stages.
    """
    if 0 in grid:
        return
    chosen = {} if configuration is None else configuration.meta
    recorded = _RECORDED.get()
    if recorded is not None:
        recorded.append(Launch(kernel, grid, args, constants, configuration))
        return
    first = next(x for x in args if isinstance(x, Tensor))
    if first.is_cuda:
        with torch.cuda.device(first.device):
            kernel[grid](*args, **constants, **chosen)
        return
    from step3_hetero.backends.cuda import interpreter

    interpreter.run(kernel, grid, args, {**constants, **chosen})


def arch_of(x: Tensor) -> int:
    """Return the compute capability of the card that holds ``x``, as 90 for 9.0."""
    if not x.is_cuda:
        return _ASSUMED_ARCH.get()
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


ELEMENTS = 4096
"""Elements of a tile of rows: 32 in each thread of four warps."""

WIDEST = 1024
"""Columns of one tile where a row may be taken in parts."""


def tile(n: int) -> tuple[int, int]:
    """Return how many rows of ``n`` columns a program takes, and the columns it reserves.

    >>> tile(96), tile(7168)
    ((32, 128), (1, 8192))
    """
    width = max(16, triton.next_power_of_2(n))
    return max(1, ELEMENTS // width), width
