"""The reference against oracles: the router, the experts, and the formats of an edge."""

import numpy as np
import pytest

from oracle import ops
from oracle.test_reference_ops import (
    F,
    call,
    check,
    check_equal,
    draw,
    each_dtype,
    each_source,
    int32,
    named,
    onnx_ops,
    onnx_or_torch,
    prepare,
    tensor,
    torch,
    wide,
)

each_wide = pytest.mark.parametrize("dtype", ["float64", "float32"])
each_format = pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])


def router_logits(name, dtype):
    """Return logits whose order is in no doubt: far apart, or equal to the bit."""
    far = np.full(48, -3000.0)  # exp underflows in float64 as well
    far[[40, 7, 21]] = 0.0, -2500.0, -2000.0
    rows = {
        "random": draw("logits", (9, 48), "float32", 2.0),
        "none": np.zeros((0, 48)),
        "all equal": np.zeros((2, 48)),
        "ties": np.tile([1.0, 3.0, 2.0, 3.0, 2.0, 3.0], (2, 8)),
        "underflow": far[None],
        "minus infinity": np.where(np.arange(48) % 5 == 2, np.arange(48.0), -np.inf)[None],
        "huge": draw("huge", (3, 48), "float32", 1e30),
    }[name]
    return np.asarray(rows).astype(named(dtype))


LOGITS = ("random", "none", "all equal", "ties", "underflow", "minus infinity", "huge")


@each_wide
@each_source
@pytest.mark.parametrize("top_k", [1, 3, 48])
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("name", LOGITS)
def test_route_takes_the_most_probable_and_of_equal_ones_the_lower(
    source, dtype, top_k, renormalise, name
):
    logits = router_logits(name, dtype)
    want, ids = ops.route(wide(logits), top_k, renormalise, dtype)
    if source != "loops":
        p, others = (
            onnx_ops.route(wide(logits), top_k)
            if source == "onnx"
            else torch_route(wide(logits), top_k, dtype)
        )
        p = p / p.sum(axis=-1, keepdims=True) if renormalise else p
        assert want.widened(ops.unit(dtype)).holds(p.astype(named(dtype))).all()
        if name != "underflow" or source == "torch":  # which are equal depends on W
            np.testing.assert_array_equal(others, ids)

    weights, chosen = call("route", logits, top_k=top_k, renormalise=renormalise)

    assert chosen.dtype == np.int32
    np.testing.assert_array_equal(chosen, ids)
    check(weights, want, dtype)


def torch_route(logits, top_k, dtype):
    """Softmax in float64, then a stable sort of what W can tell apart."""
    p = torch.from_numpy(logits).softmax(-1)
    known = p.to(getattr(torch, dtype))
    ids = torch.sort(known, dim=-1, descending=True, stable=True).indices[:, :top_k]
    return p.gather(1, ids).numpy(), ids.numpy()


def stack(dtype, experts=5, hidden=24, inter=10):
    """Return gate, up and down of a few experts."""
    shapes = {"gate": (inter, hidden), "up": (inter, hidden), "down": (hidden, inter)}
    return {n: draw(n, (experts, *shape), dtype, 0.5) for n, shape in shapes.items()}


CHOICES = {
    "mixed": int32([0, 3, 1], [4, 0, 3], [2, 1, 0], [3, 4, 2]),
    "one expert gets all": int32([2, 0], [2, 1], [2, 3]),
    "some skipped": int32([-1, 3], [4, -1], [1, 0]),
    "all skipped": int32([-1, -1], [-1, -1]),
    "one token": int32([4, 1, 0]),
    "no tokens": np.zeros((0, 3), np.int32),
}


def eager_experts(u, weights, ids, parts):
    """Return the sum in float64, nothing rounded in between, each token's experts gathered."""
    at = torch.from_numpy(np.maximum(ids, 0)).long()
    gate, up, down = (tensor(parts[n])[at] for n in ("gate", "up", "down"))
    inner = F.silu(torch.einsum("tkih,th->tki", gate, tensor(u)))
    inner = inner * torch.einsum("tkih,th->tki", up, tensor(u))
    share = tensor(weights) * torch.from_numpy(ids >= 0)
    return torch.einsum("tk,tkhi,tki->th", share, down, inner).numpy()


@each_dtype
@pytest.mark.parametrize("name", CHOICES)
def test_experts_add_up_the_chosen_and_skip_minus_one(dtype, name):
    ids, parts = CHOICES[name], stack(dtype)
    u, weights = draw("u", (len(ids), 24), dtype), draw("weights", ids.shape, dtype)

    got = call("experts", u, weights, ids, prepare("experts", dtype, parts))

    matrices = tuple(wide(parts[n]) for n in ("gate", "up", "down"))
    want = ops.experts(wide(u), wide(weights), ids, matrices, dtype)
    check(got, want, dtype)
    if dtype == "float64":
        eager = eager_experts(u, weights, ids, parts)
        assert want.holds(eager).all()
    if name == "all skipped":
        check_equal(got, np.zeros((2, 24)), dtype)


@each_dtype
def test_experts_take_block_fp8(dtype):
    shapes = {"gate": (130, 24), "up": (130, 24), "down": (24, 130)}
    scales = {"gate": (2, 1), "up": (2, 1), "down": (1, 2)}
    parts = {
        n: (
            draw(n, (2, *shape), "float8_e4m3fn", 100.0),
            np.abs(draw(n + "scale", (2, *scales[n]), "float32", 0.001)),
        )
        for n, shape in shapes.items()
    }
    u, weights = draw("u", (3, 24), dtype), draw("weights", (3, 2), dtype)
    ids = int32([0, 1], [1, 0], [1, -1])

    got = call("experts", u, weights, ids, prepare("experts", dtype, parts))

    held = (ops.block_dequantised(*map(wide, parts[n])) for n in ("gate", "up", "down"))
    matrices = tuple(ops.round_to(m, dtype) for m in held)
    check(got, ops.experts(wide(u), wide(weights), ids, matrices, dtype), dtype)


def edge_rows(name):
    """Return rows that meet the edges of the formats, all exact in bfloat16."""
    ties = np.zeros((2, 128))
    ties[0, :9] = 127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5  # scale 1 for int8
    ties[1, :9] = 448, 17, 19, -17, -19, 2.0**-10, 3 * 2.0**-10, 2.0**-11, 464 - 24  # for e4m3
    return {
        "zero": np.zeros((2, 300)),
        "ties": ties,
        "one column": np.array([[3.0], [-0.0], [2.0**-100]]),
        "one zero run of three": np.concatenate(
            [np.ones((1, 128)), np.zeros((1, 128)), -np.ones((1, 44))], axis=1
        ),
        "huge and tiny": np.array([[2.0**127, -1.0, 2.0**-100, -(2.0**100)]]),
        "no tokens": np.zeros((0, 129)),
        "no columns": np.zeros((2, 0)),
    }[name]


EDGES = (
    "zero",
    "ties",
    "one column",
    "one zero run of three",
    "huge and tiny",
    "no tokens",
    "no columns",
)


def quantised(x, dtype):
    """Run the kernel; return q and scale widened, dtypes checked."""
    q, scale = call("quantise", x, dtype=dtype)
    assert (q.dtype, scale.dtype) == (named(dtype), np.float32)
    return wide(q), wide(scale)


@each_format
@pytest.mark.parametrize("before", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("name", EDGES)
def test_quantise_meets_the_edges_of_the_format(dtype, before, name):
    x = edge_rows(name).astype(named(before))

    for got, want in zip(quantised(x, dtype), ops.quantise(wide(x), dtype), strict=True):
        np.testing.assert_array_equal(got, want)


@each_format
@pytest.mark.parametrize("source", ["onnx", "torch", "loops"])
@pytest.mark.parametrize("before", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("columns", [1, 127, 128, 129, 384])
def test_quantise_has_one_scale_for_128_columns(dtype, source, before, columns):
    x = draw("x", (5, columns), "float32" if before == "float64" else before, 10.0)
    x[1] = 0
    want_q, want_scale = ops.quantise(wide(x), dtype)
    if source != "loops":
        want_q = other_quantise(source, x.astype(np.float32), want_scale, dtype)

    q, scale = quantised(x.astype(named(before)), dtype)

    np.testing.assert_array_equal(scale, want_scale)
    np.testing.assert_array_equal(q, want_q)
    assert np.abs(q[0]).max() == ops.LARGEST[dtype]


def other_quantise(source, x, scale, dtype):
    """Quantise whole runs with given scales: zeros fill the last."""
    runs = np.zeros((len(x), scale.shape[1] * 128), np.float32)
    runs[:, : x.shape[1]] = x
    if source == "onnx":
        q = onnx_ops.quantise(runs, scale.astype(np.float32), np.zeros(scale.shape, named(dtype)))
    else:
        q = torch.from_numpy(runs) / torch.from_numpy(scale).float().repeat_interleave(128, dim=1)
        q = (q.round() if dtype == "int8" else q).to(getattr(torch, dtype)).double().numpy()
    return wide(q)[:, : x.shape[1]]


@each_format
@onnx_or_torch
@pytest.mark.parametrize("after", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(0, 128), (1, 1), (3, 130), (2, 384)], ids=str)
def test_dequantise_rounds_the_float32_product(dtype, source, after, shape):
    q = draw("q", shape, "float32", 40.0).clip(-127, 127).astype(named(dtype))
    scale = np.abs(draw("scale", (shape[0], -(-shape[1] // 128)), "float32"))
    if source == "torch":
        spread = torch.from_numpy(scale).repeat_interleave(128, dim=1)[:, : shape[1]]
        product = (tensor(q).float() * spread).to(getattr(torch, after)).double().numpy()
    else:
        whole = np.zeros((shape[0], scale.shape[1] * 128), named(dtype))
        whole[:, : shape[1]] = q
        product = ops.round_to(wide(onnx_ops.dequantise(whole, scale)), after)[:, : shape[1]]

    got = call("dequantise", q, scale, dtype=after)

    check_equal(got, product, after)
    check_equal(got, ops.dequantise(wide(q), wide(scale), after), after)


@each_format
def test_quantise_of_the_tiniest_numbers_keeps_their_sign(dtype):
    """650 of float32's smallest steps: 650 / 127 and 650 / 448 are both rounded down by much."""
    x = np.array([[650 * 2.0**-149, -650 * 2.0**-149]], np.float32)

    q, _ = quantised(x, dtype)

    assert q[0, 0] >= 0 >= q[0, 1]
