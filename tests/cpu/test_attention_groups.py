"""Sequences that decode are taken a group at a time: every one once, and with the same result."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from step3_hetero.backend import BatchMeta  # noqa: E402 after torch is known to be there
from step3_hetero.backends.cpu import attention as cpu  # noqa: E402
from step3_hetero.specs import LOGICAL_BLOCK, CacheSpec  # noqa: E402

CONTEXTS = (200, 5, 256, 140, 129, 300, 1)


@pytest.fixture
def decode():
    """Return the meta of one query for each of the contexts, each in blocks of its own."""
    lengths = np.array(CONTEXTS, np.int32)
    tables = np.arange(3 * len(lengths), dtype=np.int32).reshape(-1, 3)
    rows = np.arange(len(lengths))
    slots = tables[rows, (lengths - 1) // LOGICAL_BLOCK] * LOGICAL_BLOCK
    return BatchMeta(
        positions=lengths - 1,
        slots=(slots + (lengths - 1) % LOGICAL_BLOCK).astype(np.int32),
        query_starts=np.arange(len(lengths) + 1, dtype=np.int32),
        context_lens=lengths,
        block_tables=tables,
    )


def rows_of(batch):
    every = torch.arange(batch.meta.tokens)
    return [every[group.rows].tolist() for group in batch.groups]


def test_a_group_holds_no_more_keys_than_stay_in_cache(decode, monkeypatch):
    together = rows_of(cpu.Batch(decode))
    assert together == [[1, 6], [0, 2, 3, 4], [5]]
    monkeypatch.setattr(cpu, "KEYS_OF_A_GROUP", 600)
    assert rows_of(cpu.Batch(decode)) == [[1, 6], [0, 2], [3, 4], [5]]
    monkeypatch.setattr(cpu, "KEYS_OF_A_GROUP", 1)
    assert sorted(rows_of(cpu.Batch(decode))) == [[n] for n in range(len(CONTEXTS))]


def test_small_groups_attend_as_one_does(decode, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    cache = cpu.CpuCache(
        CacheSpec(kv_heads=1, head_dim=16, blocks=3 * len(CONTEXTS), dtype="float32")
    )
    for stored in (cache.k, cache.v):
        stored.copy_(torch.randn(stored.shape, generator=draw))
    q = torch.randn((len(CONTEXTS), 8, 16), generator=draw)
    together = cpu.attention(q, cache, cpu.Batch(decode), scale=0.25)
    monkeypatch.setattr(cpu, "KEYS_OF_A_GROUP", 300)
    apart = cpu.attention(q, cache, cpu.Batch(decode), scale=0.25)
    torch.testing.assert_close(apart, together, rtol=1e-5, atol=1e-6)
