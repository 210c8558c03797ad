"""Every op has an oracle test, and the oracle tests notice when the reference is wrong.

Defects are put into the reference's table of kernels, in memory, one at a time; the tests of the op
they stand in must fail by an assertion.
"""

import inspect
import itertools
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from oracle import ops
from oracle import test_reference_ops as rows
from oracle import test_reference_ops_attention as attention
from oracle import test_reference_ops_dense as dense
from oracle import test_reference_ops_moe as moe
from oracle import test_reference_ops_sample as sampling
from step3_hetero.ops import OPS

TESTS = {
    "add": [
        rows.test_add_rounds_the_sum_once,
        rows.test_add_of_infinities_and_beyond_the_largest,
    ],
    "attention": [
        attention.test_attention_sees_its_own_sequence_up_to_itself,
        attention.test_attention_in_chunks_agrees_with_causal_attention_over_a_past,
        attention.test_attention_whose_scores_are_far_apart_is_the_value_of_the_largest,
        attention.test_attention_of_padded_rows_is_exactly_zero_whatever_they_hold,
        attention.test_attention_over_65536_tokens,
    ],
    "cast": [
        rows.test_cast_rounds_to_nearest_ties_to_even,
        rows.test_cast_of_nothing_keeps_the_shape,
    ],
    "concat": [rows.test_concat_copies_arrays_one_after_another],
    "conv2d": [dense.test_conv2d_correlates],
    "dequantise": [moe.test_dequantise_rounds_the_float32_product],
    "embed": [rows.test_embed_gives_the_rows_of_the_table_rounded_once],
    "experts": [
        moe.test_experts_add_up_the_chosen_and_skip_minus_one,
        moe.test_experts_take_block_fp8,
    ],
    "layer_norm": [dense.test_layer_norm_is_rounded_once],
    "linear": [
        dense.test_linear_sets_products_side_by_side,
        dense.test_linear_takes_block_fp8_with_a_scale_of_its_own_for_each_block,
        dense.test_router_logits_of_bfloat16_are_not_rounded_to_it,
    ],
    "merge_rows": [rows.test_merge_rows_replaces_rows_and_skips_minus_one],
    "quantise": [
        moe.test_quantise_meets_the_edges_of_the_format,
        moe.test_quantise_has_one_scale_for_128_columns,
    ],
    "quick_gelu": [dense.test_quick_gelu_agrees],
    "resize": [dense.test_resize_is_bicubic_with_antialias_and_not_rounded],
    "rms_norm": [
        dense.test_rms_norm_rounds_before_the_weight_and_after,
        dense.test_rms_norm_of_a_row_with_infinity_is_zero_beside_it,
    ],
    "rope": [dense.test_rope_turns_halves_at_far_positions_too],
    "route": [moe.test_route_takes_the_most_probable_and_of_equal_ones_the_lower],
    "sample": [
        sampling.test_sample_gives_each_kept_id_its_share,
        sampling.test_sample_keeps_the_shortest_prefix_that_reaches_top_p,
        sampling.test_sample_at_temperature_zero_takes_the_lowest_of_the_largest,
        sampling.test_sample_never_gives_the_banned_id_however_probable,
        sampling.test_sample_takes_each_row_with_its_own_parameters,
        sampling.test_sample_of_no_rows_is_empty,
    ],
    "select_rows": [rows.test_select_rows_copies_rows_by_number],
    "self_attention": [attention.test_self_attention_sees_every_token_of_its_own_image],
    "swiglu": [
        dense.test_swiglu_gates_with_the_first_half,
        dense.test_swiglu_of_infinities_and_beyond_the_largest,
    ],
}
"""Every op and the tests that compare its kernel with an oracle."""

KERNELS = rows.REFERENCE.kernels


def runs(test):
    """Return the arguments of every run of a parametrised test."""
    axes = []
    for mark in getattr(test, "pytestmark", []):
        names = [name.strip() for name in mark.args[0].split(",")]
        values = mark.args[1]
        axes.append([dict(zip(names, v if len(names) > 1 else [v], strict=True)) for v in values])
    return [{k: v for part in parts for k, v in part.items()} for parts in itertools.product(*axes)]


def test_every_op_has_an_oracle():
    assert set(TESTS) == set(OPS) == set(KERNELS)


@pytest.mark.parametrize("op", TESTS)
def test_listed_tests_call_the_op_and_run_as_listed(op):
    for test in TESTS[op]:
        assert test.__name__.startswith("test_")
        assert f'"{op}"' in inspect.getsource(inspect.getmodule(test))
        assert all(set(one) == set(inspect.signature(test).parameters) for one in runs(test))


def interleaved_rope(x, positions, *, theta):
    halves = np.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)
    first, second = np.split(ORIGINAL["rope"](halves, positions, theta=theta), 2, axis=-1)
    return np.stack([first, second], axis=-1).reshape(x.shape)


def rope_of_float32_angles(x, positions, *, theta):
    half = x.shape[-1] // 2
    frequency = (theta ** (-np.arange(half) / half)).astype(np.float32)
    angle = positions[:, None, None].astype(np.float32) * frequency
    cos, sin = (f(angle).astype(x.dtype) for f in (np.cos, np.sin))
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def rms_norm_with_eps_outside(x, weight, *, eps):
    w = x.astype(np.promote_types(np.float32, x.dtype) if x.dtype.kind == "f" else np.float32)
    root = np.sqrt(np.mean(w * w, axis=-1, keepdims=True))
    return (w / (root + w.dtype.type(eps))).astype(x.dtype) * weight


def rms_norm_rounded_once(x, weight, *, eps):
    whole = ORIGINAL["rms_norm"](rows.wide(x), rows.wide(weight), eps=eps)
    return whole.astype(x.dtype)


def attention_one_too_far(q, cache, batch, *, scale):
    late = replace(batch.meta, positions=batch.meta.positions + 1)
    return ORIGINAL["attention"](q, cache, type(batch)(late), scale=scale)


def attention_one_too_short(q, cache, batch, *, scale):
    early = replace(batch.meta, positions=np.maximum(batch.meta.positions - 1, 0))
    return ORIGINAL["attention"](q, cache, type(batch)(early), scale=scale)


def attention_with_kv_heads_in_turn(q, cache, batch, *, scale):
    kv_heads = cache.spec.kv_heads
    order = np.argsort(np.arange(q.shape[1]) % kv_heads, kind="stable")
    out = np.empty_like(q)
    out[:, order] = ORIGINAL["attention"](q[:, order], cache, batch, scale=scale)
    return out


def attention_by_a_stale_table(q, cache, batch, *, scale):
    stale = replace(batch.meta, block_tables=np.sort(batch.meta.block_tables, axis=1))
    return ORIGINAL["attention"](q, cache, type(batch)(stale), scale=scale)


def default_scale(op):
    def kernel(q, *operands, scale):
        return ORIGINAL[op](q, *operands, scale=q.shape[-1] ** -0.5)

    return kernel


def causal_self_attention(q, k, v, *, scale):
    out = ORIGINAL["self_attention"](q, k, v, scale=scale)
    if q.shape[1]:
        out[:, :1] = v[:, :1]
    return out


def swapped_swiglu(gate_up):
    return ORIGINAL["swiglu"](np.concatenate(np.split(gate_up, 2, axis=-1)[::-1], axis=-1))


def renormalised_route(logits, *, top_k, renormalise):
    return ORIGINAL["route"](logits, top_k=top_k, renormalise=True)


def route_with_the_higher_of_equal_ones(logits, *, top_k, renormalise):
    flipped, ids = ORIGINAL["route"](logits[:, ::-1], top_k=top_k, renormalise=renormalise)
    return flipped, (logits.shape[1] - 1 - ids).astype(np.int32)


def sigmoid_route(logits, *, top_k, renormalise):
    _, ids = ORIGINAL["route"](logits, top_k=top_k, renormalise=renormalise)
    with np.errstate(over="ignore"):
        return (1 / (1 + np.exp(-np.take_along_axis(logits, ids, 1)))).astype(logits.dtype), ids


def experts_with_minus_one_as_the_last(u, weights, ids, stack):
    last = len(stack.parts["gate"]) - 1
    return ORIGINAL["experts"](u, weights, np.where(ids < 0, last, ids), stack)


def experts_with_weights_in_another_order(u, weights, ids, stack):
    return ORIGINAL["experts"](u, weights[:, ::-1], ids, stack)


def sample_with_nothing_banned(*operands, banned=-1):
    return ORIGINAL["sample"](*operands)


def sample_with_one_more_for_top_p(logits, temperature, top_k, top_p, uniform, *, banned=-1):
    p = np.exp(logits - logits.max(-1, keepdims=True, initial=-np.inf))
    p = np.sort(p / p.sum(-1, keepdims=True))[:, ::-1].cumsum(-1)
    reached = (p < top_p[:, None]).sum(-1)
    more = np.array([r[min(n + 1, len(r) - 1)] for r, n in zip(p, reached, strict=True)], p.dtype)
    return ORIGINAL["sample"](logits, temperature, top_k, more, uniform, banned=banned)


def sample_without_temperature(logits, temperature, *operands, banned=-1):
    ones = np.where(temperature > 0, 1, temperature)
    return ORIGINAL["sample"](logits, ones, *operands, banned=banned)


def linear_with_scales_transposed(x, weights, **parameters):
    tensors = weights.source
    scaled = {n: t for n, t in tensors.items() if t.scale_inv is not None}
    turned = {
        n: replace(t, scale_inv=t.scale_inv.T.reshape(t.scale_inv.shape)) for n, t in scaled.items()
    }
    again = rows.REFERENCE.prepare(
        "linear", {**tensors, **turned}, rows.OpSpec("linear", weights.dtype)
    )
    return ORIGINAL["linear"](x, again, **parameters)


def linear_without_bias(x, weights, **parameters):
    kept = {n: part for n, part in weights.parts.items() if n != "bias"}
    return ORIGINAL["linear"](x, replace(weights, parts=kept), **parameters)


def linear_rounded_to_the_activation(x, weights, *, out_dtype=None):
    out = ORIGINAL["linear"](x, weights)
    return out.astype(rows.named(out_dtype)) if out_dtype else out


def truncating_cast(x, *, dtype):
    if dtype != "bfloat16" or x.dtype != np.float32:
        return ORIGINAL["cast"](x, dtype=dtype)
    cut = (x.view(np.uint32) >> 16).astype(np.uint16).view(ml_dtypes.bfloat16)
    return np.where(np.isnan(x), ml_dtypes.bfloat16(np.nan), cut)


def quantise_with_one_scale_a_row(x, *, dtype):
    q, scale = ORIGINAL["quantise"](x, dtype=dtype)
    most = np.broadcast_to(scale.max(axis=1, keepdims=True, initial=0), scale.shape)
    spread = np.repeat(most, 128, axis=1)[:, : x.shape[1]]
    return (rows.wide(x) / spread).astype(q.dtype), most


def quantise_by_truncation(x, *, dtype):
    q, scale = ORIGINAL["quantise"](x, dtype=dtype)
    if dtype != "int8":
        return q, scale
    spread = np.repeat(scale, 128, axis=1)[:, : x.shape[1]]
    return np.trunc(x.astype(np.float32) / spread).astype(np.int8), scale


def dequantise_by_a_neighbour(q, scale, *, dtype):
    return ORIGINAL["dequantise"](q, np.roll(scale, 1, axis=1), dtype=dtype)


def merge_with_minus_one_as_the_last(x, replacement, index):
    return ORIGINAL["merge_rows"](x, replacement, index % max(len(x), 1))


def convolution(x, weights, *, stride, padding):
    parts = {**weights.parts, "weight": weights.parts["weight"][..., ::-1, ::-1]}
    return ORIGINAL["conv2d"](x, replace(weights, parts=parts), stride=stride, padding=padding)


def resize_by_the_plain_cubic(x, *, size):
    planes = rows.torch.from_numpy(rows.wide(x)).permute(2, 0, 1)[None]
    out = rows.F.interpolate(planes, (size, size), mode="bicubic")[0].permute(1, 2, 0)
    return out.numpy().astype(np.float64 if x.dtype == np.float64 else np.float32)


def layer_norm_of_a_sample(x, weight, bias, *, eps):
    grown = max(x.shape[-1] - 1, 1) / x.shape[-1]
    centred = ORIGINAL["layer_norm"](x, weight, 0 * bias, eps=eps)
    return (rows.wide(centred) * grown**0.5 + rows.wide(bias)).astype(x.dtype)


def gelu(x):
    exact = rows.F.gelu(rows.tensor(x)).numpy()
    return exact.astype(x.dtype)


def embed_times_root_of_hidden(ids, table):
    out = ORIGINAL["embed"](ids, table)
    return (rows.wide(out) * out.shape[1] ** 0.5).astype(out.dtype)


def off_by_one_ulp(op):
    """Return the kernel with one element, the last, moved to its neighbour in T."""

    def kernel(*operands, **parameters):
        out = ORIGINAL[op](*operands, **parameters)
        if out.size:
            last = out.reshape(-1)[-1:]
            last[:] = np.nextafter(last, last.dtype.type(np.inf))
        return out

    return kernel


ORIGINAL = dict(KERNELS)

DEFECTS = [
    ("add", off_by_one_ulp("add")),
    ("attention", attention_one_too_far),
    ("attention", attention_one_too_short),
    ("attention", attention_with_kv_heads_in_turn),
    ("attention", attention_by_a_stale_table),
    ("attention", default_scale("attention")),
    ("cast", truncating_cast),
    ("concat", lambda *parts: parts[0] if len(parts) == 1 else np.concatenate(parts)),
    ("concat", lambda *parts: np.concatenate(parts[::-1])),
    ("conv2d", convolution),
    ("dequantise", dequantise_by_a_neighbour),
    ("embed", embed_times_root_of_hidden),
    ("experts", experts_with_minus_one_as_the_last),
    ("experts", experts_with_weights_in_another_order),
    ("layer_norm", layer_norm_of_a_sample),
    ("linear", linear_with_scales_transposed),
    ("linear", linear_without_bias),
    ("linear", linear_rounded_to_the_activation),
    ("merge_rows", merge_with_minus_one_as_the_last),
    ("quantise", quantise_with_one_scale_a_row),
    ("quantise", quantise_by_truncation),
    ("quick_gelu", gelu),
    ("resize", resize_by_the_plain_cubic),
    ("rms_norm", rms_norm_with_eps_outside),
    ("rms_norm", rms_norm_rounded_once),
    ("rms_norm", off_by_one_ulp("rms_norm")),
    ("rope", interleaved_rope),
    ("rope", rope_of_float32_angles),
    ("route", renormalised_route),
    ("route", route_with_the_higher_of_equal_ones),
    ("route", sigmoid_route),
    ("sample", sample_with_nothing_banned),
    ("sample", sample_with_one_more_for_top_p),
    ("sample", sample_without_temperature),
    ("select_rows", lambda x, at: x[at[0] : at[-1] + 1] if len(at) else x[:0]),
    ("self_attention", causal_self_attention),
    ("self_attention", default_scale("self_attention")),
    ("swiglu", swapped_swiglu),
]


def caught(op):
    """Say whether a test of the op fails by an assertion."""
    for test in TESTS[op]:
        for arguments in runs(test):
            try:
                test(**arguments)
            except AssertionError:
                return True
    return False


@pytest.mark.parametrize(
    "op,defect", DEFECTS, ids=[f"{op}-{f.__qualname__.partition('.')[0]}" for op, f in DEFECTS]
)
def test_defect_in_the_reference_is_caught(op, defect, monkeypatch):
    monkeypatch.setitem(KERNELS, op, defect)

    assert caught(op)


def test_defects_stand_in_every_op():
    assert {op for op, _ in DEFECTS} == set(OPS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ranges_leave_little_room(dtype):
    """Nine of ten products in bfloat16 have one right value; in float32 the room is a few ulp."""
    x, w = (rows.draw(name, (64, 96), dtype) for name in "xw")
    radius = ops.linear_radius(rows.wide(x), rows.wide(w), 0.0, dtype)
    want = ops.Range.about(rows.wide(x) @ rows.wide(w).T, radius).rounded(dtype)

    single = (want.low == want.high).mean()
    assert single > 0.9 if dtype == "bfloat16" else single < 0.1
    assert (want.radius <= 2.0**-8 * np.abs(want.middle)).mean() > 0.9
