"""The reference against oracles: what moves rows or rounds, and the helpers of all such tests.

A kernel is called through the device's table, so that a seeded defect in the table is seen; what it
should give comes from ONNX's evaluator, from torch in float64 or from oracle.ops, on the inputs as
the dtype holds them. ``oracle.ops`` says how the allowed error follows from the roundings.
"""

import zlib

import ml_dtypes
import numpy as np
import pytest

from oracle import ops
from step3_hetero.registry import get_backend
from step3_hetero.specs import HostTensor, OpSpec

torch = pytest.importorskip("torch", reason="torch is not installed")
onnx_ops = pytest.importorskip("oracle.onnx_ops", reason="onnx is not installed")
F = torch.nn.functional

REFERENCE = get_backend("reference").open(0)
DTYPES = ("float64", "float32", "bfloat16")
SOURCES = ("onnx", "torch", "loops")
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_source = pytest.mark.parametrize("source", SOURCES)
onnx_or_torch = pytest.mark.parametrize("source", ["onnx", "torch"])


def named(dtype):
    """Return the NumPy dtype of a name."""
    narrow = {n: np.dtype(getattr(ml_dtypes, n)) for n in ("bfloat16", "float8_e4m3fn")}
    return narrow[dtype] if dtype in narrow else np.dtype(dtype)


def draw(label, shape, dtype, size=1.0):
    """Return normal numbers in a dtype; the same label draws the same ones."""
    rng = np.random.default_rng(zlib.crc32(label.encode()))
    return (rng.standard_normal(shape) * size).astype(named(dtype))


def wide(x):
    """Return what is stored, as float64."""
    return np.asarray(x).astype(np.float64)


def tensor(x):
    """Return what is stored, as a float64 tensor of torch."""
    return torch.from_numpy(wide(x))


def int32(*values):
    return np.array(values, np.int32)


def call(op, *operands, **parameters):
    """Run the reference's kernel."""
    return REFERENCE.kernel(op)(*operands, **parameters)


def prepare(op, dtype, parts, **parameters):
    """Return weights as the reference holds them; a pair stands for FP8 data and its scales."""
    tensors = {
        n: HostTensor(n, *part) if isinstance(part, tuple) else HostTensor(n, part)
        for n, part in parts.items()
    }
    return REFERENCE.prepare(op, tensors, OpSpec(op, dtype, {}, parameters))


def block_fp8(label, rows, columns):
    """Return FP8 data and scales of many magnitudes, none a power of two."""
    data = draw(label, (rows, columns), "float8_e4m3fn", 100.0)
    blocks = -(-rows // 128), -(-columns // 128)
    return data, (0.001 + np.abs(draw(label + "scale", blocks, "float32"))).astype(np.float32)


def check(got, want, dtype):
    """Hold a result to the range that an honest kernel may give."""
    assert (got.dtype, got.shape) == (named(dtype), want.low.shape)
    inside = want.holds(wide(got))
    at = tuple(int(i[0]) for i in np.nonzero(~inside)) if not inside.all() else ()
    assert inside.all(), (
        f"{(~inside).sum()} of {inside.size} outside; first at {at}: {wide(got)[at]} is not in "
        f"[{want.low[at]}, {want.high[at]}]"
    )


def check_equal(got, want, dtype):
    """Hold a result to one value an element."""
    check(got, ops.Range.about(want), dtype)


IDS = int32(6, 0, 3, 3, 1)


@each_dtype
@onnx_or_torch
@pytest.mark.parametrize("ids", [IDS, IDS[:1], IDS[:0]], ids=len)
@pytest.mark.parametrize("stored", ["float64", "float32", "bfloat16", "float8_e4m3fn"])
def test_embed_gives_the_rows_of_the_table_rounded_once(source, dtype, stored, ids):
    if stored == "float8_e4m3fn":
        part = block_fp8("embed", 7, 150)
        table = ops.block_dequantised(*map(wide, part))
    else:
        part = draw("embed", (7, 150), stored)
        table = wide(part)
    if (stored, dtype) == ("float64", "bfloat16"):  # see the test of casts from float64
        table = ops.round_to(table, "float32")
    want = {
        "onnx": lambda: onnx_ops.gather(table, ids),
        "torch": lambda: F.embedding(torch.from_numpy(ids.astype(int)), tensor(table)).numpy(),
    }[source]()

    got = call("embed", ids, prepare("embed", dtype, {"table": part}))

    check_equal(got, ops.round_to(want, dtype), dtype)


@each_dtype
@each_source
@pytest.mark.parametrize("index", [(4, 0), (-1, 2), (-1, -1), ()], ids=str)
def test_merge_rows_replaces_rows_and_skips_minus_one(source, dtype, index):
    x, rows = draw("x", (6, 5), dtype), draw("rows", (len(index), 5), dtype)
    at = np.array(index, np.int32)
    kept = at[at >= 0], wide(rows)[at >= 0]
    want = {
        "onnx": lambda: onnx_ops.scatter_rows(wide(x), kept[1], kept[0]),
        "torch": lambda: tensor(x).index_copy(0, torch.from_numpy(kept[0]).long(), tensor(kept[1])),
        "loops": lambda: ops.merge_rows(wide(x), wide(rows), at),
    }[source]()
    before = x.copy()

    got = call("merge_rows", x, rows, at)

    check_equal(got, np.asarray(want), dtype)
    np.testing.assert_array_equal(wide(x), wide(before))
    assert not np.shares_memory(got, x)


@each_dtype
@onnx_or_torch
@pytest.mark.parametrize("rows", [(2, 0, 2), (3,), (1, 2, 3), ()], ids=str)
def test_select_rows_copies_rows_by_number(source, dtype, rows):
    x, at = draw("x", (4, 6), dtype), np.array(rows, np.int32)
    want = {
        "onnx": lambda: onnx_ops.gather(wide(x), at),
        "torch": lambda: tensor(x).index_select(0, torch.from_numpy(at)).numpy(),
    }[source]()

    got = call("select_rows", x, at)

    check_equal(got, want, dtype)
    assert not np.shares_memory(got, x)


@each_dtype
@onnx_or_torch
@pytest.mark.parametrize("lengths", [(3,), (2, 0, 1), (0, 0), (1, 4)], ids=str)
def test_concat_copies_arrays_one_after_another(source, dtype, lengths):
    parts = [draw(f"part{i}", (n, 3, 2), dtype) for i, n in enumerate(lengths)]
    want = {
        "onnx": lambda: onnx_ops.concat(*map(wide, parts)),
        "torch": lambda: torch.cat([tensor(part) for part in parts]).numpy(),
    }[source]()

    got = call("concat", *parts)

    check_equal(got, want, dtype)
    assert not any(np.shares_memory(got, part) for part in parts)


@each_dtype
@onnx_or_torch
@pytest.mark.parametrize("tokens", [0, 1, 9])
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e4])
def test_add_rounds_the_sum_once(source, dtype, tokens, size):
    x, y = draw("x", (tokens, 130), dtype), draw("y", (tokens, 130), dtype, size)
    exact = (
        onnx_ops.run("Add", wide(x), wide(y))[0]
        if source == "onnx"
        else (tensor(x) + tensor(y)).numpy()
    )
    want = ops.Range.about(exact, ops.unit(dtype) * np.abs(exact))

    check(call("add", x, y), want.rounded(dtype), dtype)


@each_dtype
def test_add_of_infinities_and_beyond_the_largest(dtype):
    most = ops.FORMATS[dtype][2]
    x = np.array([[np.inf, -np.inf, np.inf, most, -most, most]]).astype(named(dtype))
    y = np.array([[1.0, -np.inf, -np.inf, most, -most, -most]]).astype(named(dtype))

    with np.errstate(over="ignore", invalid="ignore"):
        got = call("add", x, y)

    check_equal(got, np.array([[np.inf, -np.inf, np.nan, np.inf, -np.inf, 0.0]]), dtype)


def every_bfloat16_tie():
    """Return, for every bfloat16, the float32 it is, the tie above it, and both beside the tie."""
    high = np.arange(1 << 16, dtype=np.uint32)[:, None] << 16
    return (high + np.array([0, 0x7FFF, 0x8000, 0x8001], np.uint32)).view(np.float32).ravel()


def every_e4m3_tie():
    """Return every float8_e4m3fn, every tie between two, and the float32 on both sides of each.

    464 is the tie with what would come after the largest. Beyond it ml_dtypes gives NaN and torch
    448: the op does not say.
    """
    values = wide(np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn))
    values = np.sort(values[np.isfinite(values)])
    ties = (values[1:] + values[:-1]) / 2
    exact = np.concatenate([values, ties, [464, -464]]).astype(np.float32)
    below, above = (np.nextafter(exact, np.float32(end)) for end in (-np.inf, np.inf))
    every = np.concatenate([exact, below, above, np.float32([np.nan])])
    return every[~(np.abs(every) > 464)]


CASTS = {
    ("float32", "bfloat16"): every_bfloat16_tie,
    ("float32", "float8_e4m3fn"): every_e4m3_tie,
    ("bfloat16", "float8_e4m3fn"): lambda: every_e4m3_tie().astype(ml_dtypes.bfloat16),
    ("bfloat16", "float32"): lambda: every_bfloat16_tie()[::4].astype(ml_dtypes.bfloat16),
    ("float32", "float64"): every_bfloat16_tie,
    ("bfloat16", "bfloat16"): lambda: every_bfloat16_tie()[::4].astype(ml_dtypes.bfloat16),
    ("float64", "float32"): lambda: wide(every_bfloat16_tie()[::7]) * (1 + 2.0**-25),
    ("float64", "bfloat16"): lambda: wide(every_bfloat16_tie()[::7]),
}


@pytest.mark.parametrize("source", ["torch", "loops"])
@pytest.mark.parametrize("pair", CASTS, ids=" to ".join)
def test_cast_rounds_to_nearest_ties_to_even(source, pair):
    before, dtype = pair
    with np.errstate(invalid="ignore"):  # signalling NaN among all bit patterns
        x = CASTS[pair]()
        exact = wide(x)
    if source == "torch":
        want = wide(
            torch.from_numpy(exact)
            .to(getattr(torch, before))
            .to(getattr(torch, dtype))
            .double()
            .numpy()
        )
    else:
        want = ops.round_to(exact, dtype)

    with np.errstate(over="ignore", invalid="ignore"):
        got = call("cast", x, dtype=dtype)

    check_equal(got, want, dtype)
    number = ~np.isnan(want)
    np.testing.assert_array_equal(np.signbit(wide(got))[number], np.signbit(want)[number])


def test_cast_of_nothing_keeps_the_shape():
    assert call("cast", np.zeros((0, 3), np.float32), dtype="bfloat16").shape == (0, 3)
