"""Every cpu kernel against the reference in float64 on the same inputs, per row.

The bound is four times the squared error that the reference itself makes in the dtype, and never
less than a few roundings of the dtype: short rows may be lucky in the reference.
"""

import zlib

import ml_dtypes
import numpy as np
import pytest

from step3_hetero.ops import OPS
from step3_hetero.specs import CacheSpec, HostTensor, OpSpec

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8}


class Case:
    """One call: arrays drawn by shape, weights by shape, parameters."""

    def __init__(self, op, *shapes, weights=None, scale=1.0, **parameters):
        self.op, self.shapes, self.weights = op, shapes, weights or {}
        self.scale, self.parameters = scale, parameters

    def __str__(self):
        shapes = ",".join("x".join(map(str, s)) for s in (*self.shapes, *self.weights.values()))
        rest = "".join(f",{k}={v}" for k, v in self.parameters.items())
        return f"{self.op}[{shapes}{rest}]"

    def draw(self, dtype):
        rng = np.random.default_rng(zlib.crc32(str(self).encode()))
        arrays = [(rng.standard_normal(s) * self.scale).astype(DTYPES[dtype]) for s in self.shapes]
        weights = {
            n: HostTensor(n, (rng.standard_normal(s) * s[-1] ** -0.5).astype(DTYPES[dtype]))
            for n, s in self.weights.items()
        }
        return arrays, weights


CASES = [
    Case("rms_norm", (7, 96), (96,), eps=1e-5),
    Case("rms_norm", (3, 64), (64,), scale=1e-3, eps=1e-5),
    Case("rms_norm", (0, 64), (64,), eps=1e-5),
    Case("layer_norm", (5, 64), (64,), (64,), eps=1e-6),
    Case("add", (5, 64), (5, 64)),
    Case("swiglu", (5, 160)),
    Case("swiglu", (1, 160), scale=30.0),
    Case("quick_gelu", (5, 64)),
    Case("linear", (1, 96), weights={"a": (40, 96), "b": (8, 96)}),
    Case("linear", (17, 96), weights={"a": (40, 96), "bias": (40,)}),
    Case("linear", (0, 96), weights={"a": (40, 96)}),
    Case("linear", (5, 96), weights={"a": (6, 96)}, out_dtype="float32"),
    Case(
        "conv2d",
        (2, 8, 8, 6),
        weights={"weight": (10, 6, 2, 2), "bias": (10,)},
        stride=2,
        padding=0,
    ),
    Case("conv2d", (1, 9, 9, 6), weights={"weight": (4, 6, 3, 3)}, stride=2, padding=1),
    Case("resize", (8, 8, 6), size=5),
    Case("resize", (8, 8, 6), size=11),
    Case("self_attention", (2, 20, 4, 16), (2, 20, 4, 16), (2, 20, 4, 16), scale=1.0, factor=0.25),
]


def put(device, arrays, weights, case, dtype):
    arrays = [device.from_host(a) for a in arrays]
    if weights:
        out = case.parameters.get("out_dtype", dtype)
        arrays.append(
            device.prepare(case.op, weights, OpSpec(case.op, dtype, {}, {"out_dtype": out}))
        )
    return arrays


def call(device, case, dtype, arrays, weights):
    parameters = dict(case.parameters)
    if "factor" in parameters:
        parameters = {"scale": parameters.pop("factor")}
    out = device.kernel(case.op)(*put(device, arrays, weights, case, dtype), **parameters)
    return device.to_host(out)


def row_error(got, want):
    error = ((got.astype(np.float64) - want) ** 2).sum(-1)
    size = (want**2).sum(-1)
    return np.where(size > 0, error / np.where(size > 0, size, 1), np.where(error > 0, np.inf, 0))


def bound(own, dtype):
    return 4 * np.maximum(own, own.mean() if own.size else 0) + (8 * ROUNDOFF[dtype]) ** 2


def widened(arrays):
    return [a.astype(np.float64) if a.dtype.kind in "fV" else a for a in arrays]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_agrees_with_reference(case, dtype, cpu, reference):
    arrays, weights = case.draw(dtype)
    wide = {n: HostTensor(n, t.data.astype(np.float64)) for n, t in weights.items()}
    exact = Case(case.op, **case.parameters)
    if "out_dtype" in exact.parameters:
        exact.parameters["out_dtype"] = "float64"
    want = call(reference, exact, "float64", widened(arrays), wide)
    own = call(reference, case, dtype, arrays, weights)
    got = call(cpu, case, dtype, arrays, weights)
    assert (got.shape, got.dtype) == (own.shape, own.dtype)
    assert np.isfinite(got.astype(np.float64)).all()
    assert (row_error(got, want) <= bound(row_error(own, want), dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads,kv_heads", [(8, 1), (8, 2), (4, 4)])
@pytest.mark.parametrize(
    "lengths,contexts,padding",
    [
        ([1], [1], 0),
        ([1, 1, 1], [5, 128, 129], 0),
        ([40, 1, 1, 7], [40, 300, 17, 200], 0),
        ([1, 3], [130, 3], 4),
        ([], [], 2),
    ],
)
def test_paged_attention_agrees_with_reference(
    dtype, heads, kv_heads, lengths, contexts, padding, cpu, reference, make_meta
):
    rng = np.random.default_rng(3)
    meta = make_meta(lengths, contexts, blocks=12, rng=rng, padding=padding)
    history = rng.standard_normal((2, 12 * 128, kv_heads, 16)).astype(DTYPES[dtype])
    q, k, v = (
        rng.standard_normal((meta.tokens, n, 16)).astype(DTYPES[dtype])
        for n in (heads, kv_heads, kv_heads)
    )

    def attend(device, name):
        cast = [
            device.from_host(a.astype(np.float64) if name == "float64" else a) for a in (q, k, v)
        ]
        cache = device.open_cache(CacheSpec(kv_heads, 16, 12, name))
        keys = 12 * 128
        whole = make_meta([keys], [keys], blocks=12, rng=np.random.default_rng(0))
        past = [device.from_host(h.astype(np.float64) if name == "float64" else h) for h in history]
        cache.write(past[0], past[1], device.batch(whole))
        batch = device.batch(meta)
        cache.write(cast[1], cast[2], batch)
        return device.to_host(device.kernel("attention")(cast[0], cache, batch, scale=0.25))

    want, own, got = attend(reference, "float64"), attend(reference, dtype), attend(cpu, dtype)
    real = int(meta.query_starts[-1])
    assert (got[real:].astype(float) == 0).all()
    if real:
        assert (
            row_error(got[:real], want[:real]) <= bound(row_error(own[:real], want[:real]), dtype)
        ).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_experts_agree_with_reference(dtype, tokens, cpu, reference):
    rng = np.random.default_rng(5)
    u = rng.standard_normal((tokens, 32)).astype(DTYPES[dtype])
    weights = rng.random((tokens, 3)).astype(DTYPES[dtype])
    ids = np.array([rng.permutation(5)[:3] for _ in range(tokens)], np.int32).reshape(tokens, 3)
    ids[ids == 4] = -1  # an expert that gets no token, and a slot that adds nothing
    shapes = {"gate": (5, 80, 32), "up": (5, 80, 32), "down": (5, 32, 80)}
    stack = {
        n: (rng.standard_normal(s) * s[-1] ** -0.5).astype(DTYPES[dtype]) for n, s in shapes.items()
    }

    def run(device, name):
        as_ = (lambda a: a.astype(np.float64)) if name == "float64" else (lambda a: a)
        prepared = device.prepare(
            "experts", {n: HostTensor(n, as_(t)) for n, t in stack.items()}, OpSpec("experts", name)
        )
        arrays = (device.from_host(a) for a in (as_(u), as_(weights), ids))
        return device.to_host(device.kernel("experts")(*arrays, prepared))

    want, own, got = run(reference, "float64"), run(reference, dtype), run(cpu, dtype)
    assert got.shape == (tokens, 32)
    assert (row_error(got, want) <= bound(row_error(own, want), dtype)).all()


@pytest.mark.parametrize("renormalise", [False, True])
def test_route_agrees_and_ties_go_to_the_lower_expert(renormalise, cpu, reference):
    logits = np.random.default_rng(2).standard_normal((64, 48)).astype(np.float32)
    logits[0] = 0
    logits[1, 10:20] = 7
    logits[2] = np.linspace(0, -200, 48)  # probabilities that underflow
    results = []
    for device in (reference, cpu):
        out = device.kernel("route")(device.from_host(logits), top_k=3, renormalise=renormalise)
        results.append([device.to_host(a) for a in out])
    np.testing.assert_array_equal(results[0][1], results[1][1])
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-6)
    assert results[1][1][:2].tolist() == [[0, 1, 2], [10, 11, 12]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_agrees_with_reference_at_far_positions(dtype, cpu, reference):
    x = np.random.default_rng(1).standard_normal((4, 3, 16)).astype(DTYPES[dtype])
    positions = np.array([0, 1, 1000, 65535], np.int32)
    got, own = (
        d.to_host(d.kernel("rope")(d.from_host(x), d.from_host(positions), theta=5e5))
        for d in (cpu, reference)
    )
    want = reference.kernel("rope")(x.astype(np.float64), positions, theta=5e5)
    assert (row_error(got, want) <= bound(row_error(own, want), dtype)).all()


def test_sampling_agrees_for_greedy_and_for_every_kind_of_draw(cpu, reference):
    rng = np.random.default_rng(4)
    rows = 40
    logits = rng.standard_normal((rows, 50)).astype(np.float32)
    arguments = [
        logits,
        rng.choice([0.0, 0.7, 1.5], rows),
        rng.choice([0, 1, 5], rows).astype(np.int32),
        rng.choice([1.0, 0.9, 0.3], rows),
        rng.random(rows),
    ]
    got, want = (
        d.to_host(d.kernel("sample")(*[d.from_host(a) for a in arguments], banned=3))
        for d in (cpu, reference)
    )
    np.testing.assert_array_equal(got, want)
    assert (got != 3).all()


@pytest.mark.parametrize("wire", ["float8_e4m3fn", "int8"])
def test_quantise_gives_the_same_bits_and_dequantise_undoes_it(wire, cpu, reference):
    x = np.random.default_rng(6).standard_normal((3, 300)).astype(np.float32)
    x[1] = 0
    (q, s), (qc, sc) = (
        [d.to_host(a) for a in d.kernel("quantise")(d.from_host(x), dtype=wire)]
        for d in (reference, cpu)
    )
    np.testing.assert_array_equal(s, sc)
    np.testing.assert_array_equal(q.view(np.int8), qc.view(np.int8))
    back = cpu.to_host(
        cpu.kernel("dequantise")(cpu.from_host(q), cpu.from_host(s), dtype="float32")
    )
    largest = np.abs(x).max(-1, keepdims=True)
    assert (np.abs(back - x) <= largest / (16 if wire.startswith("f") else 127)).all()


def test_cpu_brings_a_kernel_for_every_op(cpu, reference):
    assert set(cpu.kernels) == set(OPS) == set(reference.kernels)


def test_block_fp8_weights_are_multiplied_by_their_scales(cpu, reference):
    rng = np.random.default_rng(7)
    data = rng.standard_normal((130, 200)).astype(ml_dtypes.float8_e4m3fn)
    tensor = HostTensor("w", data, rng.random((2, 2)).astype(np.float32) + 0.5)
    x = rng.standard_normal((3, 200)).astype(np.float32)
    got, want = (
        d.to_host(
            d.kernel("linear")(
                d.from_host(x), d.prepare("linear", {"w": tensor}, OpSpec("linear", "float32"))
            )
        )
        for d in (cpu, reference)
    )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    by_hand = float(data[129, 199]) * tensor.scale_inv[1, 1]
    unit = np.zeros((1, 200), np.float32)
    unit[0, 199] = 1
    one = reference.kernel("linear")(
        unit, reference.prepare("linear", {"w": tensor}, OpSpec("linear", "float32"))
    )
    assert one[0, 129] == pytest.approx(by_hand)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_reaches_back_65536_tokens(dtype, cpu, reference, make_meta):
    rng = np.random.default_rng(8)
    keys = 65536
    history = rng.standard_normal((2, keys, 1, 8)).astype(DTYPES[dtype])
    history[0, 5] *= 8  # one far key that matters
    q = (history[0, 5:6].astype(np.float32) / 4).astype(DTYPES[dtype]).repeat(2, axis=1)
    whole = make_meta([keys], [keys], blocks=512, rng=np.random.default_rng(0))
    last = type(whole)(
        whole.positions[-1:],
        whole.slots[-1:],
        np.array([0, 1], np.int32),
        whole.context_lens,
        whole.block_tables,
    )

    def attend(device, name):
        as_ = (lambda a: a.astype(np.float64)) if name == "float64" else (lambda a: a)
        cache = device.open_cache(CacheSpec(1, 8, 512, name))
        k, v = (device.from_host(as_(h)) for h in history)
        cache.write(k, v, device.batch(whole))
        out = device.kernel("attention")(
            device.from_host(as_(q)), cache, device.batch(last), scale=0.3
        )
        return device.to_host(out)

    want, own, got = attend(reference, "float64"), attend(reference, dtype), attend(cpu, dtype)
    assert np.abs(want - history[1, 5].astype(float)).max() < 0.5
    assert (row_error(got, want) <= bound(row_error(own, want), dtype)).all()
