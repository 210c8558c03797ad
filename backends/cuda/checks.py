"""Batches that a kernel would read or write out of its arrays with, refused on the host."""

from __future__ import annotations

import numpy as np

from step3_hetero.backend import BatchMeta
from step3_hetero.errors import UnsupportedOp
from step3_hetero.specs import LOGICAL_BLOCK


def longest_context(meta: BatchMeta) -> int:
    """Return the tokens of a batch's longest sequence."""
    return int(meta.context_lens.max(initial=0))


def check_width(meta: BatchMeta) -> None:
    """Refuse sequences longer than their rows of the block table.

    Raises:
        UnsupportedOp: one is; keys would be read by numbers that lie behind the table.
    """
    columns = meta.block_tables.shape[1]
    if longest_context(meta) > columns * LOGICAL_BLOCK:
        seq = int(meta.context_lens.argmax())
        raise UnsupportedOp(
            f"sequence {seq} has {meta.context_lens[seq]} tokens; its row of the block table has "
            f"{columns} blocks of {LOGICAL_BLOCK}"
        )


def check_indices(meta: BatchMeta, blocks: int) -> None:
    """Refuse slots, blocks and positions that a cache of ``blocks`` blocks does not have.

    Raises:
        UnsupportedOp: one is out of range; it would be memory of something else.
    """
    for name, values, low, end in (
        ("slot", meta.slots, -1, blocks * LOGICAL_BLOCK),
        ("block", meta.block_tables, 0, blocks),
    ):
        bad = values[(values < low) | (values >= end)]
        if bad.size:
            raise UnsupportedOp(
                f"{name} {bad[0]} is not in this cache: {low} to {end - 1} are allowed"
            )
    queries = np.diff(meta.query_starts)
    if (queries < 0).any() or meta.query_starts[0] != 0 or meta.query_starts[-1] > meta.tokens:
        raise UnsupportedOp(
            f"query_starts {meta.query_starts.tolist()} do not rise from 0 to at most the "
            f"{meta.tokens} tokens of the batch"
        )
    ends = np.repeat(meta.context_lens, queries)
    positions = meta.positions[: len(ends)]
    wrong = np.flatnonzero((positions < 0) | (positions >= ends))
    if wrong.size:
        raise UnsupportedOp(
            f"position {positions[wrong[0]]} of token {wrong[0]} is not in its sequence: 0 to "
            f"{ends[wrong[0]] - 1} are allowed"
        )
