"""What each op of the package means, in plain loops, and how far an honest kernel may err.

Nothing here imports the package, or rounds by ml_dtypes. Numbers are float64. ``T`` is the dtype of
the activations, ``W`` that of the sums (float32, or float64 for float64). A kernel that computes in
W and rounds once to T must land in ``Range.about(exact, radius).rounded(T)``. Rounding is monotone,
so that a bound on the error in W, which is the textbook one for any order of summation, says which
values of T are right; for bfloat16 that is nearly always a single one.

Source of the bounds: Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., ch. 2 and 3.
"""

import math
from dataclasses import dataclass
from decimal import Decimal, localcontext

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

BLOCK = 128
"""Columns of one scale on an edge, both sides of one in a checkpoint, tokens of a KV block."""

FORMATS = {
    "float64": (53, -1022, float(np.finfo(np.float64).max), np.inf),
    "float32": (24, -126, float(np.finfo(np.float32).max), np.inf),
    "bfloat16": (8, -126, (2 - 2.0**-7) * 2.0**127, np.inf),
    "float8_e4m3fn": (4, -6, 448.0, np.nan),
}
"""Bits of the significand, least exponent, largest value, and what is beyond it."""

LARGEST = {"float8_e4m3fn": 448.0, "int8": 127.0}

FUNCTION = 6
"""Roundoffs in one exp, sin or cos: 3 ulp, to which NumPy's own tests hold them in float32."""

PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")


def wide(dtype: str) -> str:
    """Return W of a T."""
    return "float64" if dtype == "float64" else "float32"


def unit(dtype: str) -> float:
    """Return the roundoff of a kernel's W and of an oracle's float64 together."""
    return 2.0 ** -FORMATS[wide(dtype)][0] + 2.0**-53


def tiny(dtype: str) -> float:
    """Return the smallest number of W: what underflow may lose."""
    bits, least, _, _ = FORMATS[wide(dtype)]
    return 2.0 ** (least - bits + 1)


def round_to(x: Array, dtype: str) -> Array:
    """Round float64 values to the nearest of a format, ties to even, as float64 again."""
    if dtype == "float64":
        return np.asarray(x, np.float64)
    bits, least, largest, beyond = FORMATS[dtype]
    x = np.asarray(x, np.float64)
    _, exponent = np.frexp(x)  # x = m · 2^exponent, m in [1/2, 1)
    quantum = np.maximum(exponent - 1, least) - (bits - 1)
    with np.errstate(invalid="ignore"):
        rounded = np.ldexp(np.rint(np.ldexp(x, -quantum)), quantum)
    over = np.abs(rounded) > largest
    return np.where(over, np.copysign(beyond, x), rounded)


@dataclass(frozen=True)
class Range:
    """For each element the least and the largest value that an honest kernel may give."""

    low: Array
    high: Array

    @classmethod
    def about(cls, exact: Array, radius: Array | float = 0.0) -> "Range":
        """Return the values no further than ``radius`` from ``exact``; not finite: that alone."""
        exact = np.asarray(exact, np.float64)
        radius = np.where(np.isfinite(exact), radius, 0)
        return cls(exact - radius, exact + radius)

    def rounded(self, dtype: str) -> "Range":
        """Return what rounding to ``dtype`` makes of it."""
        return Range(round_to(self.low, dtype), round_to(self.high, dtype))

    def times(self, factor: Array) -> "Range":
        """Return the product with exact numbers."""
        ends = self.low * factor, self.high * factor
        return Range(np.minimum(*ends), np.maximum(*ends))

    def widened(self, roundoff: float) -> "Range":
        """Return it with one more relative error at each end."""
        return Range(
            self.low - np.abs(self.low) * roundoff, self.high + np.abs(self.high) * roundoff
        )

    def holds(self, values: Array) -> npt.NDArray[np.bool_]:
        """Say of each value whether it lies within; NaN only where it must be NaN."""
        nan = np.isnan(self.low) & np.isnan(self.high)
        return ((self.low <= values) & (values <= self.high)) | (nan & np.isnan(values))

    @property
    def middle(self) -> Array:
        """Return the middle of each."""
        return (self.low + self.high) / 2

    @property
    def radius(self) -> Array:
        """Return half the width of each."""
        return (self.high - self.low) / 2


# Dot products and normalisation.


def linear_radius(x: Array, matrix: Array, bias: Array | float, dtype: str) -> Array:
    """Bound the error of x·Wᵀ + bias. Shapes: x (..., n), matrix (m, n) -> (..., m)."""
    size = np.abs(x) @ np.abs(matrix).T + np.abs(bias)
    return (x.shape[-1] + 2) * (unit(dtype) * size + tiny(dtype))


def rms_radius(exact: Array, dtype: str) -> Array:
    """Bound the error of x / sqrt(mean(x²) + eps): half that of the sum, and four more."""
    return (exact.shape[-1] / 2 + 4) * unit(dtype) * np.abs(exact) + tiny(dtype)


def layer_norm_radius(x: Array, weight: Array, bias: Array, eps: float, dtype: str) -> Array:
    """Bound the error of layer_norm, cancellation in x - mean included."""
    n, u = x.shape[-1], unit(dtype)
    centred = x - x.mean(axis=-1, keepdims=True)
    off = (n + 1) * u * np.abs(x).mean(axis=-1, keepdims=True) + u * np.abs(centred)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    spread = (off * (2 * np.abs(centred) + off)).mean(axis=-1, keepdims=True) + (
        n + 2
    ) * u * variance
    root = np.sqrt(variance + eps)
    relative = spread / (variance + eps) / 2 + 4 * u
    error = off / root + np.abs(centred) / root * relative
    size = np.abs(centred / root * weight) + np.abs(bias)
    return error * np.abs(weight) + 3 * u * size + tiny(dtype)


def gate_radius(exact: Array, x: Array, factor: Array | float, dtype: str) -> Array:
    """Bound the error of x · sigmoid(a x) · factor, a up to 2 and itself rounded."""
    u, small = unit(dtype), tiny(dtype)
    relative = (FUNCTION + 6 + 4 * np.abs(x)) * u
    return relative * np.abs(exact) + 2 * small * (1 + np.abs(x)) * (1 + np.abs(factor))


# Rotation.


def angles(positions: npt.NDArray[np.int32], head_dim: int, theta: float) -> tuple[Array, Array]:
    """Return position · theta^(-2i/d) to 50 digits, as (whole angle, rest after full turns).

    Shapes: positions (tokens,) -> twice (tokens, head_dim / 2).
    """
    half = head_dim // 2
    whole, rest = np.zeros((2, len(positions), half))
    with localcontext() as context:
        context.prec = 50
        for i in range(half):
            frequency = Decimal(theta) ** (Decimal(-2 * i) / head_dim)
            for t, position in enumerate(positions.tolist()):
                angle = position * frequency
                whole[t, i] = float(angle)
                rest[t, i] = float(angle % (2 * PI))
    return whole, rest


def rotation(
    positions: npt.NDArray[np.int32], head_dim: int, theta: float, dtype: str
) -> tuple[Range, Range]:
    """Return cosine and sine in T of angles that a kernel computes in float64.

    The angle errs by the roundings of exponent, power and product: the exponent's, at most once
    ln(theta), is multiplied by it. Shapes: -> twice (tokens, 1, head_dim / 2).
    """
    whole, rest = angles(positions, head_dim, theta)
    radius = ((math.log(theta) + FUNCTION + 1) * whole + FUNCTION) * 2.0**-53
    tables = (Range.about(f(rest)[:, None, :], radius[:, None, :]) for f in (np.cos, np.sin))
    cos, sin = (table.rounded(dtype) for table in tables)
    return cos, sin


def rotated(x: Array, exact: Array, cos: Range, sin: Range, dtype: str) -> Range:
    """Return the range about ``exact``, the rotation by the middles of the tables, rounded to T."""
    a, b = np.split(np.abs(x), 2, axis=-1)
    doubt = np.concatenate(
        [a * cos.radius + b * sin.radius, b * cos.radius + a * sin.radius], axis=-1
    )
    c, s = np.abs(cos.middle), np.abs(sin.middle)
    size = np.concatenate([a * c + b * s, b * c + a * s], axis=-1)
    return Range.about(exact, doubt + 4 * unit(dtype) * size + 2 * tiny(dtype)).rounded(dtype)


# Attention: a sequence's keys are found slot by slot.


def paged(stored: Array, table: npt.NDArray[np.int32], length: int) -> Array:
    """Return a sequence's rows in order. Shapes: stored (slots, ...) -> (length, ...)."""
    rows = [stored[int(table[i // BLOCK]) * BLOCK + i % BLOCK] for i in range(length)]
    return np.array(rows).reshape(length, *stored.shape[1:])


def attend(
    q: Array, k: Array, v: Array, visible: npt.NDArray[np.bool_], scale: float, dtype: str
) -> tuple[Array, Array]:
    """Return softmax(scale · q·kᵀ)·v over the visible keys, and the bound on a kernel's error.

    Shapes: q (queries, heads, d), k, v (keys, kv_heads, d), visible (queries, keys)
    -> twice (queries, heads, d).
    """
    out, radius = np.zeros(q.shape), np.zeros(q.shape)
    u, group = unit(dtype), q.shape[1] // k.shape[1]
    for i, h in np.ndindex(q.shape[:2]):
        keys, values = (x[visible[i], h // group] for x in (k, v))
        if not len(keys):
            continue
        score = scale * (keys @ q[i, h])
        off = (q.shape[2] + 3) * u * abs(scale) * (np.abs(keys) @ np.abs(q[i, h]))
        below = score - score.max()
        p = np.exp(below) / np.exp(below).sum()
        # each probability errs with its own score and with the sum's, both through exp
        relative = np.expm1(2 * off.max() + u * np.abs(below)) + (len(keys) + 2 * FUNCTION + 3) * u
        out[i, h] = p @ values
        radius[i, h] = (p * relative + len(keys) * (u * p + tiny(dtype))) @ np.abs(values)
    return out, radius


# The router and the experts.


def route(
    logits: Array, top_k: int, renormalise: bool, dtype: str
) -> tuple[Range, npt.NDArray[np.int32]]:
    """Choose experts by sorting (probability in W, number) pairs, one token at a time."""
    u, n = unit(dtype), logits.shape[1]
    weights, radius = np.zeros((2, len(logits), top_k))
    ids = np.zeros((len(logits), top_k), np.int32)
    for t, row in enumerate(logits):
        below = row - row.max()
        p = np.array([math.exp(x) for x in below])
        p = p / math.fsum(p)
        known = round_to(p, wide(dtype))  # what underflows is a tie
        chosen = sorted(range(n), key=lambda e: (-known[e], e))[:top_k]
        total = math.fsum(p[chosen]) if renormalise else 1.0
        ids[t], weights[t] = chosen, p[chosen] / total
        reach = np.abs(np.where(np.isfinite(below), below, 0))[chosen]
        radius[t] = (reach + n + top_k + 4 * FUNCTION) * u * weights[t] + 2 * tiny(dtype)
    return Range.about(weights, radius).rounded(wide(dtype)), ids


def experts(
    u: Array,
    weights: Array,
    ids: npt.NDArray[np.int32],
    matrices: tuple[Array, Array, Array],
    dtype: str,
) -> Range:
    """Return the weighted sum over each token's experts, one expert of one token at a time.

    gate·u, up·u, silu(gate) · up and down are rounded to T each, the sum at its end.
    """
    out, radius = np.zeros(u.shape), np.zeros(u.shape)
    for t, place in np.ndindex(ids.shape):
        e = int(ids[t, place])
        if e >= 0:
            one = expert(u[t], *(m[e] for m in matrices), dtype)
            share = weights[t, place]
            out[t] += share * one.middle
            size = np.abs(share) * (np.abs(one.middle) + one.radius)
            radius[t] += np.abs(share) * one.radius + (ids.shape[1] + 1) * unit(dtype) * size
    return Range.about(out, radius + tiny(dtype)).rounded(dtype)


def expert(u: Array, gate: Array, up: Array, down: Array, dtype: str) -> Range:
    """Return one expert's output for one token. Shapes: u (hidden,) -> (hidden,)."""
    g, v = (Range.about(m @ u, linear_radius(u, m, 0.0, dtype)).rounded(dtype) for m in (gate, up))
    silu = g.middle / (1 + np.exp(-g.middle))
    exact = silu * v.middle
    # silu's slope is below 1.1 everywhere
    doubt = 1.1 * g.radius * (np.abs(v.middle) + v.radius) + np.abs(silu) * v.radius
    inner = Range.about(exact, doubt + gate_radius(exact, g.middle, v.middle, dtype)).rounded(dtype)
    error = inner.radius @ np.abs(down).T + linear_radius(inner.middle, down, 0.0, dtype)
    return Range.about(down @ inner.middle, error).rounded(dtype)


# Formats.


def block_dequantised(data: Array, scale_inv: Array) -> Array:
    """Return a block-FP8 matrix element by element, each product rounded to float32."""
    out = np.zeros(data.shape)
    for *stack, r, c in np.ndindex(data.shape):
        at = (*stack, r, c)
        out[at] = data[at] * scale_inv[(*stack, r // BLOCK, c // BLOCK)]
    return round_to(out, "float32")


def quantise(x: Array, dtype: str) -> tuple[Array, Array]:
    """Return q and scale for each row and run of 128 columns; every step rounded to float32."""
    runs = math.ceil(x.shape[1] / BLOCK)
    q, scale = np.zeros(x.shape), np.ones((len(x), runs))
    for t, run in np.ndindex(len(x), runs):
        columns = slice(run * BLOCK, (run + 1) * BLOCK)
        largest = max(abs(value) for value in x[t, columns].tolist())
        if largest > 0:
            scale[t, run] = round_to(np.float64(largest / LARGEST[dtype]), "float32")
        quotient = round_to(x[t, columns] / scale[t, run], "float32")
        whole = np.rint(quotient) if dtype == "int8" else round_to(quotient, dtype)
        q[t, columns] = whole
    return q, scale


def dequantise(q: Array, scale: Array, dtype: str) -> Array:
    """Return q · scale in float32, rounded to dtype."""
    out = np.zeros(q.shape)
    for t, c in np.ndindex(q.shape):
        out[t, c] = q[t, c] * scale[t, c // BLOCK]
    return round_to(round_to(out, "float32"), dtype)


# Choosing a token.


def kept(
    logits: Array, temperature: float, top_k: int, top_p: float, banned: int
) -> list[tuple[int, float]]:
    """Return what may be drawn as (id, probability), the most probable first.

    Probabilities are of the whole vocabulary but the banned id, and no new ones after the cuts.
    """
    allowed = {i: float(x) for i, x in enumerate(logits) if i != banned and x > -math.inf}
    top = max(allowed.values())
    mass = {i: math.exp((x - top) / temperature) for i, x in allowed.items()}
    total = math.fsum(mass.values())
    ranked = sorted(((i, m / total) for i, m in mass.items()), key=lambda one: (-one[1], one[0]))
    ranked = ranked[:top_k] if top_k else ranked
    if top_p >= 1:
        return ranked
    for n in range(1, len(ranked) + 1):
        if math.fsum(p for _, p in ranked[:n]) >= top_p:
            return ranked[:n]
    return ranked


def greedy(logits: Array, banned: int) -> int:
    """Return the lowest of the ids with the largest logit, the banned one aside."""
    return min((-float(x), i) for i, x in enumerate(logits) if i != banned)[1]


def merge_rows(x: Array, rows: Array, index: npt.NDArray[np.int32]) -> Array:
    """Return a copy of x whose row index[i] is rows[i]; -1 is skipped."""
    out = [row.copy() for row in x]
    for row, at in zip(rows, index.tolist(), strict=True):
        if at != -1:
            out[at] = row
    return np.array(out).reshape(x.shape)
