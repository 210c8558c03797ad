"""The reference against oracles: products, norms, activations, rotation, vision."""

import math

import numpy as np
import pytest

from oracle import ops, resample
from oracle.test_reference_ops import (
    F,
    block_fp8,
    call,
    check,
    check_equal,
    draw,
    each_dtype,
    int32,
    named,
    onnx_ops,
    onnx_or_torch,
    prepare,
    tensor,
    torch,
    wide,
)

EPS = 2.0**-17  # near the model's 1e-5, and exact in ONNX's float32 attributes


def product(source, x, matrix, bias):
    if source == "onnx":
        return onnx_ops.linear(x, matrix, bias)
    return F.linear(
        *(None if a is None else torch.from_numpy(a) for a in (x, matrix, bias))
    ).numpy()


@each_dtype
@onnx_or_torch
@pytest.mark.parametrize("tokens", [0, 1, 17])
@pytest.mark.parametrize("shapes", [[(40, 96)], [(40, 96), (8, 96), (1, 96)], [(3, 1)]], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("out_dtype", [None, "float32"])
def test_linear_sets_products_side_by_side(source, dtype, tokens, shapes, with_bias, out_dtype):
    x = draw("x", (tokens, shapes[0][1]), dtype)
    parts = {f"w{i}": draw(f"w{i}", shape, dtype) for i, shape in enumerate(shapes)}
    whole = np.concatenate([wide(w) for w in parts.values()])
    bias = draw("bias", (len(whole),), dtype) if with_bias else None
    wide_bias = None if bias is None else wide(bias)
    given = parts | ({} if bias is None else {"bias": bias})
    parameters = {} if out_dtype is None else {"out_dtype": out_dtype}

    got = call("linear", x, prepare("linear", dtype, given), **parameters)

    exact = product(source, wide(x), whole, wide_bias)
    radius = ops.linear_radius(wide(x), whole, 0.0 if bias is None else wide_bias, dtype)
    out = out_dtype or dtype
    check(got, ops.Range.about(exact, radius).rounded(out), out)


@each_dtype
@onnx_or_torch
@pytest.mark.parametrize("shape", [(3, 5), (128, 128), (129, 257), (130, 40)], ids=str)
def test_linear_takes_block_fp8_with_a_scale_of_its_own_for_each_block(source, dtype, shape):
    part = block_fp8(str(shape), *shape)
    x = draw("x", (4, shape[1]), dtype)
    matrix = ops.round_to(ops.block_dequantised(*map(wide, part)), dtype)

    got = call("linear", x, prepare("linear", dtype, {"w": part}))

    exact = product(source, wide(x), matrix, None)
    radius = ops.linear_radius(wide(x), matrix, 0.0, dtype)
    check(got, ops.Range.about(exact, radius).rounded(dtype), dtype)


def test_router_logits_of_bfloat16_are_not_rounded_to_it():
    x, w = draw("x", (9, 64), "bfloat16"), draw("w", (48, 64), "bfloat16")
    weights = prepare("linear", "bfloat16", {"w": w}, out_dtype="float32")

    got = call("linear", x, weights, out_dtype="float32")

    exact = product("torch", wide(x), wide(w), None)
    radius = ops.linear_radius(wide(x), wide(w), 0.0, "bfloat16")
    check(got, ops.Range.about(exact, radius).rounded("float32"), "float32")
    assert (ops.round_to(wide(got), "bfloat16") != wide(got)).mean() > 0.9


@each_dtype
@onnx_or_torch
@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (7, 96), (2, 3, 40), (1, 7168)], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e3])
def test_rms_norm_rounds_before_the_weight_and_after(source, dtype, shape, size):
    x, weight = draw("x", shape, dtype, size), draw("weight", shape[-1:], dtype)
    if len(x) > 1:
        x[0] = 0
    unit = (
        onnx_ops.rms_norm(wide(x), EPS)
        if source == "onnx"
        else F.rms_norm(tensor(x), shape[-1:], None, EPS).numpy()
    )

    got = call("rms_norm", x, weight, eps=EPS)

    rounded = ops.Range.about(unit, ops.rms_radius(unit, dtype)).rounded(dtype)
    last = 2.0**-53 if dtype == "float64" else 0.0  # there the product itself is inexact here
    check(got, rounded.times(wide(weight)).widened(last).rounded(dtype), dtype)


@each_dtype
@onnx_or_torch
def test_rms_norm_of_a_row_with_infinity_is_zero_beside_it(source, dtype):
    x = np.array([[1.0, np.inf, -2.0], [1.0, 2.0, 3.0]]).astype(named(dtype))
    with np.errstate(invalid="ignore"):
        got = call("rms_norm", x, np.ones(3, named(dtype)), eps=EPS)
        want = (
            onnx_ops.rms_norm(wide(x), EPS)
            if source == "onnx"
            else F.rms_norm(tensor(x), (3,), None, EPS).numpy()
        )

    check_equal(got[:1], want[:1], dtype)
    assert np.isfinite(wide(got[1])).all()


@each_dtype
@onnx_or_torch
@pytest.mark.parametrize("shape", [(0, 64), (5, 64), (2, 3, 40), (1, 1)], ids=str)
@pytest.mark.parametrize("size,offset", [(1.0, 0.0), (1e-3, 0.0), (1.0, 300.0), (0.0, 7.0)])
def test_layer_norm_is_rounded_once(source, dtype, shape, size, offset):
    x = (wide(draw("x", shape, dtype, size)) + offset).astype(named(dtype))
    weight, bias = draw("weight", shape[-1:], dtype), draw("bias", shape[-1:], dtype)
    if source == "onnx":
        exact = onnx_ops.layer_norm(wide(x), wide(weight), wide(bias), EPS)
    else:
        exact = F.layer_norm(tensor(x), shape[-1:], tensor(weight), tensor(bias), EPS).numpy()

    got = call("layer_norm", x, weight, bias, eps=EPS)

    radius = ops.layer_norm_radius(wide(x), wide(weight), wide(bias), EPS, dtype)
    check(got, ops.Range.about(exact, radius).rounded(dtype), dtype)


GATES = (0.0, -0.0, 1e-30, -1e-30, 20.0, -20.0, 88.0, -88.0, -103.0, 1000.0, -1000.0)


@each_dtype
@onnx_or_torch
@pytest.mark.parametrize("tokens", [0, 1, 6])
@pytest.mark.parametrize("size", [1.0, 8.0])
def test_swiglu_gates_with_the_first_half(source, dtype, tokens, size):
    gate, up = draw("gate", (tokens, 40), dtype, size), draw("up", (tokens, 40), dtype, size)
    gate[:, : len(GATES)] = np.array(GATES).astype(named(dtype))
    exact = (
        onnx_ops.swiglu(wide(gate), wide(up))
        if source == "onnx"
        else (F.silu(tensor(gate)) * tensor(up)).numpy()
    )

    got = call("swiglu", np.concatenate([gate, up], axis=1))

    radius = ops.gate_radius(exact, wide(gate), wide(up), dtype)
    check(got, ops.Range.about(exact, radius).rounded(dtype), dtype)


@each_dtype
def test_swiglu_of_infinities_and_beyond_the_largest(dtype):
    most = ops.FORMATS[dtype][2]
    gate = np.array([np.inf, np.inf, 1.0, most, most])
    up = np.array([2.0, -1.0, np.inf, most, 1.0])
    with np.errstate(over="ignore"):
        got = call("swiglu", np.concatenate([gate, up])[None].astype(named(dtype)))

    check_equal(got, np.array([[np.inf, -np.inf, np.inf, np.inf, most]]), dtype)


@each_dtype
@pytest.mark.parametrize("source", ["torch", "loops"])
@pytest.mark.parametrize("shape", [(0, 5), (1, 40), (3, 2, 40)], ids=str)
@pytest.mark.parametrize("size", [1.0, 8.0])
def test_quick_gelu_agrees(source, dtype, shape, size):
    x = draw("x", shape, dtype, size)
    x[..., : min(11, shape[-1])] = np.array(GATES).astype(named(dtype))[: shape[-1]]
    if source == "torch":
        exact = (tensor(x) * torch.sigmoid(1.702 * tensor(x))).numpy()
    else:
        # of two equal forms the one whose exponential is at most 1
        sigmoids = [
            1 / (1 + math.exp(-1.702 * v))
            if v >= 0
            else math.exp(1.702 * v) / (1 + math.exp(1.702 * v))
            for v in wide(x).ravel().tolist()
        ]
        exact = wide(x) * np.array(sigmoids).reshape(shape)

    got = call("quick_gelu", x)

    radius = ops.gate_radius(exact, wide(x), 1.0, dtype)
    check(got, ops.Range.about(exact, radius).rounded(dtype), dtype)


def turned(source, x, cos, sin):
    """Rotate by tables (tokens, 1, d / 2); torch multiplies complex numbers."""
    if source == "onnx":
        return onnx_ops.rope(x, cos[:, 0], sin[:, 0])
    a, b = (torch.from_numpy(half.copy()) for half in np.split(x, 2, axis=-1))
    z = torch.complex(a, b) * torch.complex(torch.from_numpy(cos), torch.from_numpy(sin))
    return torch.cat([z.real, z.imag], dim=-1).numpy()


POSITIONS = int32(0, 1, 127, 128, 4095, 65535)


@each_dtype
@onnx_or_torch
@pytest.mark.parametrize("heads,head_dim", [(1, 2), (3, 16), (2, 256)])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("positions", [POSITIONS, POSITIONS[-1:], POSITIONS[:0]], ids=len)
def test_rope_turns_halves_at_far_positions_too(source, dtype, heads, head_dim, theta, positions):
    x = draw("x", (len(positions), heads, head_dim), dtype)
    cos, sin = ops.rotation(positions, head_dim, theta, dtype)
    exact = turned(source, wide(x), cos.middle, sin.middle)

    got = call("rope", x, positions, theta=theta)

    check(got, ops.rotated(wide(x), exact, cos, sin, dtype), dtype)


CONVOLUTIONS = [
    ((2, 8, 8, 6), (10, 6, 2, 2), 2, 0),
    ((1, 9, 7, 6), (4, 6, 3, 3), 2, 1),
    ((1, 28, 28, 3), (5, 3, 14, 14), 14, 0),
    ((1, 5, 6, 1), (1, 1, 1, 1), 1, 0),
]


@each_dtype
@onnx_or_torch
@pytest.mark.parametrize("shape,kernel,stride,padding", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_conv2d_correlates(source, dtype, shape, kernel, stride, padding, with_bias):
    x, weight = draw("x", shape, dtype), draw("weight", kernel, dtype)
    bias = draw("bias", kernel[:1], dtype) if with_bias else None
    parts = {"weight": weight} | ({} if bias is None else {"bias": bias})

    def convolve(a, w, b):
        if source == "onnx":
            return onnx_ops.conv2d(a, w, b, stride, padding)
        maps = torch.from_numpy(a).permute(0, 3, 1, 2)
        b = None if b is None else torch.from_numpy(b)
        out = F.conv2d(maps, torch.from_numpy(w), b, stride=stride, padding=padding)
        return out.permute(0, 2, 3, 1).numpy()

    got = call("conv2d", x, prepare("conv2d", dtype, parts), stride=stride, padding=padding)

    exact = convolve(wide(x), wide(weight), None if bias is None else wide(bias))
    size = convolve(
        np.abs(wide(x)), np.abs(wide(weight)), None if bias is None else np.abs(wide(bias))
    )
    radius = (weight[0].size + 2) * (ops.unit(dtype) * size + ops.tiny(dtype))
    check(got, ops.Range.about(exact, radius).rounded(dtype), dtype)


@each_dtype
def test_conv2d_of_no_images_is_empty(dtype):
    weights = prepare("conv2d", dtype, {"weight": draw("weight", (3, 2, 2, 2), dtype)})

    got = call("conv2d", np.zeros((0, 4, 4, 2), named(dtype)), weights, stride=2, padding=0)

    check_equal(got, np.zeros((0, 2, 2, 3)), dtype)


def resized(source, x, size):
    if source == "onnx":
        return onnx_ops.resize(x, size)
    if source == "loops":
        return resample.resize(x.transpose(2, 0, 1), size, size, resample.cubic).transpose(1, 2, 0)
    planes = torch.from_numpy(x).permute(2, 0, 1)[None]
    out = F.interpolate(planes, (size, size), mode="bicubic", antialias=True)
    return out[0].permute(1, 2, 0).numpy()


RESIZES = [
    (source, shape, size)
    for source in ("onnx", "torch", "loops")
    for shape in [(8, 8, 3), (16, 8, 1), (7, 10, 2)]
    for size in [1, 2, 4, 8, 16, 5, 11]
    if source != "onnx" or (shape[0] != 7 and size not in {5, 11})  # its ratios are float32
]


@each_dtype
@pytest.mark.parametrize("source,shape,size", RESIZES, ids=str)
def test_resize_is_bicubic_with_antialias_and_not_rounded(source, dtype, shape, size):
    x = draw("x", shape, dtype)
    out = ops.wide(dtype)
    exact = resized(source, wide(x), size)

    got = call("resize", x, size=size)

    down, across = (np.abs(resample.weights(n, size, resample.cubic)) for n in shape[:2])
    products = np.einsum("ih,jw,hwn->ijn", down, across, np.abs(wide(x)))
    # a filter's argument errs by a few roundoffs of the side, and its slope is below 2
    taps = [
        np.count_nonzero(m, axis=1).max() * 8 * n * 2.0**-53 * 3
        for m, n in ((down, shape[0]), (across, shape[1]))
    ]
    weights = sum(taps) * down.sum(1).max() * across.sum(1).max() * np.abs(wide(x)).max()
    radius = (shape[0] + shape[1] + 6) * ops.unit(dtype) * products + weights
    check(got, ops.Range.about(exact, radius).rounded(out), out)
