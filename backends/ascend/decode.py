"""The Triton kernels' launches: option ``triton: true``, decoding sequences only.

Never run on hardware. Prompts, and devices opened without the option, use the vendor's operator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from step3_hetero.backends.ascend import driver, limits
from step3_hetero.errors import PlacementError
from step3_hetero.specs import LOGICAL_BLOCK

Launch = Callable[[str, Sequence[int], Sequence[Tensor | int | float], Mapping[str, int]], None]
"""Run a kernel of kernels/attention.py by name: its grid, arguments in order, constants."""

TILE = LOGICAL_BLOCK
"""Keys of one step: a whole block of the cache, the largest tile that lies in one."""

MERGED_ROWS = 16
"""Heads that one program merges, the fewest that a device has."""


def launcher() -> Launch:
    """Return what launches kernels on this machine's cards.

    Raises:
        PlacementError: there is no compiler for them, or no card.
    """
    if driver.stand_in():
        raise PlacementError(
            "backend ascend, option triton: the host stand-in runs no Triton kernel; leave the "
            "option off (make ascend-t3 runs what the compiler makes of the kernels)"
        )
    if find_spec("triton") is None or find_spec("triton.backends.ascend") is None:
        raise PlacementError(
            "backend ascend, option triton: triton-ascend is not installed; leave the option off, "
            "or install triton-ascend==3.2.0 where no other triton is"
        )
    return _on_card


def _on_card(
    name: str,
    grid: Sequence[int],
    args: Sequence[Tensor | int | float],
    constants: Mapping[str, int],
) -> None:
    from step3_hetero.backends.ascend.kernels import attention

    place = next(x.device for x in args if isinstance(x, Tensor))
    with driver.module().device(place):  # a launch goes to the current device of its thread
        getattr(attention, name)[tuple(grid)](*args, **constants)


def attend(
    launch: Launch,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    contexts: Tensor,
    *,
    scale: float,
    parts: int = 1,
    split: int = 0,
) -> Tensor:
    """Attend from one query a sequence, in ``parts`` of ``split`` keys each.

    Shapes: q (seqs, heads, d), keys, values (blocks, 128, 1, d), table (seqs, blocks), contexts
    (seqs,) int32 -> q's.

    Raises:
        LimitExceeded: a shape that was never compiled, or too many programs.
    """
    seqs, heads, head_dim = q.shape
    limits.decode_heads(heads)
    limits.decode_tile(heads, head_dim, TILE)
    limits.programs(seqs * parts)
    limits.cache_elements(keys.numel())
    several = parts > 1
    if several:
        limits.programs(seqs * heads // MERGED_ROWS)
    out = torch.empty_like(q)
    partial = q.new_empty((parts, *q.shape), dtype=torch.float32) if several else out
    lse = q.new_empty((parts, seqs, heads) if several else 1, dtype=torch.float32)
    share = split if several else limits.INT32_MAX
    given = (q.contiguous(), keys, values, partial, lse, table, contexts)
    launch("attend", (seqs, parts), (*given, table.stride(0), share, scale),
           constants(heads, head_dim, split=several))  # fmt: skip
    if several:
        merged = {"ROWS": MERGED_ROWS, "HEAD_DIM": head_dim}
        launch("combine", (seqs * heads // MERGED_ROWS,), (partial, lse, out, parts), merged)
    return out


def constants(heads: int, head_dim: int, tile: int = TILE, *, split: bool) -> dict[str, int]:
    """Return what ``attend`` is compiled for; a tile larger than the cache's block needs larger
    blocks."""
    page = max(tile, LOGICAL_BLOCK)
    return {"HEADS": heads, "HEAD_DIM": head_dim, "PAGE": page, "BLOCK_N": tile,
            "SPLIT": int(split)}  # fmt: skip
