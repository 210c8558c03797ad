"""Devices to compare, and the inputs to compare them on."""

import numpy as np
import pytest

from step3_hetero.backend import BatchMeta
from step3_hetero.registry import get_backend


@pytest.fixture(scope="session")
def reference():
    return get_backend("reference").open(0)


@pytest.fixture(scope="session")
def cpu():
    backend = get_backend("cpu")
    if backend.why_unavailable():
        pytest.skip(backend.why_unavailable())
    return backend.open(0)


@pytest.fixture
def make_meta():
    return batch_meta


def batch_meta(lengths, contexts, *, blocks, rng, padding=0):
    """Lay out sequences that add ``lengths`` tokens to reach ``contexts``, in shuffled blocks."""
    positions = [np.arange(c - n, c) for n, c in zip(lengths, contexts, strict=True)]
    free = list(rng.permutation(blocks))
    width = max((-(-c // 128) for c in contexts), default=0)
    tables = np.zeros((len(lengths), width), np.int32)
    slots = []
    for s, (p, c) in enumerate(zip(positions, contexts, strict=True)):
        used = -(-c // 128)
        tables[s, :used] = [free.pop() for _ in range(used)]
        slots.append(tables[s, p // 128] * 128 + p % 128)
    tail = np.zeros(padding, np.int64)
    return BatchMeta(
        np.concatenate([*positions, tail]).astype(np.int32),
        np.concatenate([*slots, tail - 1]).astype(np.int32),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        np.array(contexts, np.int32),
        tables,
    )
