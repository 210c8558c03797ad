"""The reference's sampling against plain Python: each draw that is in no doubt, one by one."""

import math

import numpy as np
import pytest

from oracle import ops
from oracle.test_reference_ops import call, draw, int32, named, torch, wide

each_wide = pytest.mark.parametrize("dtype", ["float64", "float32"])
DOUBT = 1e-6
"""Shares of probability that float32 sums do not tell apart: 16 roundoffs of a total of 1."""


def sample(logits, temperature, top_k, top_p, uniforms, banned):
    """Draw from one distribution once for each uniform number."""
    rows = len(uniforms)
    got = call(
        "sample",
        np.tile(logits, (rows, 1)),
        np.full(rows, temperature, logits.dtype),
        np.full(rows, top_k, np.int32),
        np.full(rows, top_p, logits.dtype),
        np.array(uniforms, np.float64),
        banned=banned,
    )
    assert (got.dtype, got.shape) == (np.int32, (rows,))
    return got.tolist()


def draws(ranked):
    """Return uniform numbers inside each entry's share, near both its ends, and the entry's id."""
    ends = np.cumsum([0.0, *(p for _, p in ranked)])
    ends = ends / ends[-1]
    pairs = []
    for (token, _), low, high in zip(ranked, ends, ends[1:], strict=False):
        if high - low > 4 * DOUBT:
            pairs += [(u, token) for u in (low + DOUBT, (low + high) / 2, high - DOUBT)]
    return [(0.0, ranked[0][0]), *pairs]


def distribution(name, dtype):
    """Return the logits of one row."""
    rows = {
        "random": draw("sample", (40,), "float32", 2.0),
        "equal": np.zeros(8),
        "ties": np.array([1.0, 3.0, 2.0, 3.0, 2.0, 3.0, -1.0]),
        "minus infinity": np.array([-np.inf, 1.0, -np.inf, 2.0, 0.0]),
        "underflow": np.array([0.0, -4000.0, 1.0, -2000.0]),
        "huge": np.array([1e30, -1e30, 1e30, 3.0]),
    }[name]
    return np.asarray(rows).astype(named(dtype))


DISTRIBUTIONS = ("random", "equal", "ties", "minus infinity", "underflow", "huge")


@each_wide
@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("temperature", [0.25, 4.0])
@pytest.mark.parametrize("top_k", [0, 3, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.75, 0.3125, 0.0])
@pytest.mark.parametrize("banned", [-1, 3, 0])
def test_sample_gives_each_kept_id_its_share(dtype, name, temperature, top_k, top_p, banned):
    logits = distribution(name, dtype)
    ranked = ops.kept(wide(logits), temperature, top_k, top_p, banned)
    pairs = draws(ranked)

    got = sample(logits, temperature, top_k, top_p, [u for u, _ in pairs], banned)

    assert got == [token for _, token in pairs]


@each_wide
@pytest.mark.parametrize("top_p,count", [(0.125, 1), (0.5, 4), (0.5625, 5), (0.875, 7)])
def test_sample_keeps_the_shortest_prefix_that_reaches_top_p(dtype, top_p, count):
    """Eight equal probabilities of 1/8 are exact: there is no rounding to hide behind."""
    middles = [(i + 0.5) / count for i in range(count)]

    got = sample(distribution("equal", dtype), 1.0, 0, top_p, [*middles, 1 - 2.0**-53], -1)

    assert got == [*range(count), count - 1]


@each_wide
@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("banned", [-1, 1, 3, 0])
def test_sample_at_temperature_zero_takes_the_lowest_of_the_largest(dtype, name, banned):
    logits = distribution(name, dtype)

    got = sample(logits, 0.0, 2, 0.5, [0.0, 0.999], banned)

    assert got == [ops.greedy(wide(logits), banned)] * 2
    if banned < 0:
        assert got[0] == int(torch.from_numpy(wide(logits)).argmax())


@each_wide
def test_sample_never_gives_the_banned_id_however_probable(dtype):
    logits = np.array([0.0, 50.0, 0.0, 0.0]).astype(named(dtype))
    uniforms = [0.0, 0.2, 0.4, 0.6, 0.8, 1 - 2.0**-53]

    assert set(sample(logits, 1.0, 0, 1.0, uniforms, 1)) == {0, 2, 3}
    assert set(sample(logits, 0.0, 0, 1.0, uniforms, 1)) == {0}


@each_wide
def test_sample_takes_each_row_with_its_own_parameters(dtype):
    logits = np.stack([distribution("ties", dtype)] * 4)
    temperature = np.array([0.0, 1.0, 1.0, 1.0], logits.dtype)
    top_k, top_p = int32(0, 1, 3, 0), np.array([1.0, 1.0, 1.0, 0.01], logits.dtype)

    got = call("sample", logits, temperature, top_k, top_p, np.full(4, 0.999), banned=-1)

    assert got.tolist() == [1, 1, 5, 1]


@each_wide
def test_sample_of_no_rows_is_empty(dtype):
    none = np.zeros(0, named(dtype))
    got = call("sample", np.zeros((0, 5), named(dtype)), none, int32(), none, none)

    assert (got.dtype, got.shape) == (np.int32, (0,))


def test_sample_leaves_the_logits_as_they_were():
    logits = distribution("random", "float64")
    before = logits.copy()

    sample(logits, 1.0, 0, 1.0, [0.5], 3)

    np.testing.assert_array_equal(logits, before)
    assert math.isfinite(logits[3])


@each_wide
def test_sample_with_a_uniform_number_of_one_gives_no_banned_id(dtype):
    """float32 rounds a draw near 1 to 1."""
    logits = np.array([0.0, 1.0, 2.0]).astype(named(dtype))

    assert sample(logits, 1.0, 0, 1.0, [1.0], 1) == [0]
