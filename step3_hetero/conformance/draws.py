"""How inputs are drawn: distributions by name, weights, and where sequences lie in a cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import ml_dtypes
import numpy as np
import numpy.typing as npt

from step3_hetero.backend import BatchMeta
from step3_hetero.specs import FP8_BLOCK, LOGICAL_BLOCK, HostArray, HostTensor

Float64 = npt.NDArray[np.float64]
Float32 = npt.NDArray[np.float32]
Draw = Callable[[np.random.Generator, tuple[int, ...]], Float64]

TILE = 1 << 20
"""Values drawn for a weight larger than this; the rest repeats them in another order."""

NAMED = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
}


def dtype_of(name: str) -> np.dtype[np.generic]:
    """Return NumPy's dtype of a name, ml_dtypes' own included."""
    return NAMED.get(name) or np.dtype(name)


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Float64:
    """Standard normal values."""
    return rng.standard_normal(shape)


def scaled(factor: float) -> Draw:
    """Return a draw of normal values times ``factor``."""
    return lambda rng, shape: normal(rng, shape) * factor


def zero_rows(rng: np.random.Generator, shape: tuple[int, ...]) -> Float64:
    """Every other row of the last axis is zero."""
    x = normal(rng, shape)
    x[..., ::2, :] = 0
    return x


def spread(rng: np.random.Generator, shape: tuple[int, ...]) -> Float64:
    """Rows whose sizes differ by up to ten orders of magnitude."""
    sizes = np.power(10.0, rng.uniform(-5, 5, (*shape[:-1], 1)))
    return normal(rng, shape) * sizes


def infinities(rng: np.random.Generator, shape: tuple[int, ...]) -> Float64:
    """One value in 64 is infinite, of either sign."""
    x = normal(rng, shape)
    x[rng.random(shape) < 1 / 64] = np.inf
    return np.copysign(x, normal(rng, shape))


def offset(rng: np.random.Generator, shape: tuple[int, ...]) -> Float64:
    """Values around 100: a mean that must be taken off before squares are summed."""
    return normal(rng, shape) + 100


def overflowing(rng: np.random.Generator, shape: tuple[int, ...]) -> Float64:
    """Magnitudes at bfloat16's largest, 3.39e38: some lie beyond it and inside float32."""
    sizes = 3.4e38 * (1 - 2.0 ** -rng.integers(6, 12, shape))
    return np.asarray(np.copysign(sizes, normal(rng, shape)), np.float64)


def halfway(rng: np.random.Generator, shape: tuple[int, ...]) -> Float64:
    """Values exactly between two neighbours of bfloat16: ties go to the even one."""
    mantissa = 1 + (rng.integers(0, 128, shape) + 0.5) / 128
    halves: Float64 = mantissa * 2.0 ** rng.integers(-3, 4, shape)
    return halves


def extremes(rng: np.random.Generator, shape: tuple[int, ...]) -> Float64:
    """Rows of plus and minus one magnitude, from 1e-38 to 3e38: every code is a format's largest.

    A scale that is rounded up or down must neither wrap nor pass the format's end.
    """
    sizes = np.power(10.0, rng.uniform(-37.5, 38.4, (*shape[:-1], 1)))
    return np.copysign(sizes * np.ones(shape), normal(rng, shape))


DRAWS: Mapping[str, Draw] = {
    "normal": normal,
    "tiny": scaled(1e-3),  # squares near eps: an eps that is wrong shows
    "minute": scaled(1e-15),
    "huge": scaled(1e15),
    "large": scaled(30.0),
    "zero-rows": zero_rows,
    "spread": spread,
    "infinities": infinities,
    "offset": offset,
    "overflowing": overflowing,
    "halfway": halfway,
    "extremes": extremes,
}
"""Distributions of real inputs by the name that a case carries."""


def weight(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    dtype: str,
    stored: str = "",
    name: str = "w",
    *,
    gain: float = 1.0,
) -> HostTensor:
    """Draw a weight so that outputs are ``gain`` times as large as inputs.

    ``stored`` is the checkpoint's dtype, the case's unless given; as e4m3 it brings scales.
    """
    fan_in = math.prod(shape[1:]) if len(shape) == 4 else shape[-1]
    if stored == "float8_e4m3fn":
        codes = tiled(rng, shape).astype(ml_dtypes.float8_e4m3fn)
        blocks = (*shape[:-2], -(-shape[-2] // FP8_BLOCK), -(-shape[-1] // FP8_BLOCK))
        scale = (rng.random(blocks) + 0.5) * gain / math.sqrt(fan_in)
        return HostTensor(name, codes, scale.astype(np.float32))
    values = tiled(rng, shape) * np.float32(gain / math.sqrt(fan_in))
    return HostTensor(name, values.astype(dtype_of(stored or dtype)))


def tiled(rng: np.random.Generator, shape: tuple[int, ...]) -> Float32:
    """Draw normal values; beyond a million the same ones again, in another order."""
    count = math.prod(shape)
    if count <= TILE:
        return rng.standard_normal(shape, dtype=np.float32)
    tile = rng.standard_normal(TILE, dtype=np.float32).reshape(-1, 64)
    out = np.empty(-(-count // TILE) * TILE, np.float32)
    for start in range(0, out.size, TILE):
        out[start : start + TILE] = tile[rng.permutation(len(tile))].ravel()
    return out[:count].reshape(shape)


def lay_out(
    rng: np.random.Generator,
    queries: Sequence[int],
    contexts: Sequence[int],
    blocks: int,
    padding: int = 0,
) -> BatchMeta:
    """Lay out sequences that add ``queries`` tokens to reach ``contexts``, in shuffled blocks."""
    free = list(rng.permutation(blocks))
    width = max((-(-c // LOGICAL_BLOCK) for c in contexts), default=0)
    tables = np.zeros((len(queries), width), np.int32)
    positions = [np.arange(c - n, c) for n, c in zip(queries, contexts, strict=True)]
    slots: list[HostArray] = []
    for s, (p, c) in enumerate(zip(positions, contexts, strict=True)):
        used = -(-c // LOGICAL_BLOCK)
        tables[s, :used] = [free.pop() for _ in range(used)]
        slots.append(tables[s, p // LOGICAL_BLOCK] * LOGICAL_BLOCK + p % LOGICAL_BLOCK)
    tail = np.zeros(padding, np.int64)
    return BatchMeta(
        np.concatenate([*positions, tail]).astype(np.int32),
        np.concatenate([*slots, tail - 1]).astype(np.int32),
        np.concatenate([[0], np.cumsum(queries)]).astype(np.int32),
        np.array(contexts, np.int32),
        tables,
    )


def filling(blocks: int) -> BatchMeta:
    """Return a batch that writes every slot of a cache once, in order."""
    keys = np.arange(blocks * LOGICAL_BLOCK, dtype=np.int32)
    ends = np.array([0, len(keys)], np.int32)
    return BatchMeta(keys, keys, ends, ends[1:], np.arange(blocks, dtype=np.int32)[None])
