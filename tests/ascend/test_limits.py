"""Every limit on both sides of its bound: what it takes, what it refuses, and what it says."""

from functools import partial

import pytest

from step3_hetero.backends.ascend import limits as l
from step3_hetero.errors import UnsupportedOp

EP = partial(l.expert_parallel, tokens=1, hidden=1, top_k=1, shared_experts=0)
EP16 = partial(l.expert_parallel, 16)
ONE = {"tokens": 1, "hidden": 1, "top_k": 1, "shared_experts": 0}
MASK = (2048, 2048)
PAGES = (4, 1, 128)
SCALES = ("float32", "bfloat16", PAGES, 1)

BOUNDS = {
    "head ratio": [(l.head_ratio, (64, 1), (65, 1)), (l.head_ratio, (128, 2), (128, 1)),
                   (l.head_ratio, (6, 3), (7, 3)), (l.head_ratio, (1, 1), (1, 0))],
    "query heads": [(l.query_heads, (256,), (257,)), (l.query_heads, (1,), (0,))],
    "head dim": [(l.head_dim, (512,), (528,)), (l.head_dim, (256,), (255,)),
                 (l.head_dim, (16,), (0,)), (l.head_dim, (512, "int8"), (544, "int8")),
                 (l.head_dim, (32, "int8"), (48, "int8"))],
    "layout": [(partial(l.layout, paged=True), ("BNSD", 256), ("TND", 128)),
               (partial(l.layout, paged=False), ("TND", 128), ("TND", 256)),
               (partial(l.layout, paged=False), ("BSH", 256), ("NTD", 128))],
    "block size": [(l.block_size, (512, 2), (640, 2)), (l.block_size, (128, 2), (64, 2)),
                   (l.block_size, (16, 1), (8, 1)), (l.block_size, (496, 1), (528, 1)),
                   (l.block_size, (32, 1, "int8"), (16, 1, "int8")),
                   (l.block_size, (480, 1, "int8"), (496, 1, "int8"))],
    "block table": [(l.block_table, ((3, 4), "int32", 3, 4), ((3, 4), "int32", 3, 5)),
                    (l.block_table, ((3, 4), "int32", 3, 4), ((3, 4), "int64", 3, 4)),
                    (l.block_table, ((3, 4), "int32", 3, 4), ((3, 4), "int32", 2, 4)),
                    (l.block_table, ((3, 4), "int32", 3, 4), ((12,), "int32", 3, 4))],
    "KV lengths": [(l.kv_lengths, ([262144], 1, 1), ([262145], 1, 1)),
                   (l.kv_lengths, ([262145], 1, 2), (None, 1, 2)),
                   (l.kv_lengths, ([1, 1], 2, 1), ([1], 2, 1))],
    "KV scales": [(l.kv_scales, (PAGES, *SCALES), ((4, 128), *SCALES)),
                  (l.kv_scales, (PAGES, *SCALES), (None, *SCALES)),
                  (l.kv_scales, (PAGES, *SCALES), (PAGES, "bfloat16", *SCALES[1:]))],
    "KV scales, queries": [(l.kv_scales, (PAGES, *SCALES), (PAGES, *SCALES[:3], 2))],
    "KV scales, query dtype": [(l.kv_scales, (PAGES, *SCALES),
                                (PAGES, "float32", "float16", PAGES, 1))],
    "KV dtype": [(l.kv_format, ("int8", "bfloat16"), ("float8_e4m3fn", "bfloat16")),
                 (l.kv_format, ("bfloat16", "float32"), ("float32", "bfloat16")),
                 (l.kv_format, (None, "float32"), ("float64", "float32"))],
    "graphs, attention dtype": [(l.graph_dtype, ("bfloat16",), ("float32",))],
    "sequences": [(l.sequences, (65536,), (65537,))],
    "cache elements": [(l.cache_elements, (2**31 - 1,), (2**31,))],
    "cache row": [(l.flat_cache, (85, 771), (256, 256))],
    "sparse mode": [(l.mask, (MASK, "bool", 3), (MASK, "bool", 5))],
    "mask": [(l.mask, (MASK, "bool", 3), ((2047, 2048), "bool", 3)),
             (l.mask, ((1, 1, *MASK), "int8", 3), ((1, 1, 1, *MASK), "int8", 3)),
             (l.mask, (None, None, 0), (None, None, 3)),
             (l.mask, ((5, 5), "uint8", 0), ((5, 5), "bfloat16", 0))],
    "cache mode": [(l.cache_mode, ("Norm",), ("PA_NZ",)), (l.cache_mode, ("Norm",), (None,))],
    "slots": [(l.slots, ("int64",), ("int16",))],
    "rotary": [(l.rotary, (894, 1), (896, 1)), (l.rotary, (256, 999), (256, 1000)),
               (l.rotary, (2, 1), (3, 1)), (l.rotary, (2, 1), (0, 1)),
               (l.rotary, (128, 1, "npu_apply_rotary_pos_emb"),
                (256, 1, "npu_apply_rotary_pos_emb"))],
    "positions": [(l.positions, (65535,), (65536,)), (l.positions, (0,), (-1,))],
    "axes": [(l.axes, ("npu_rms_norm", 2), ("npu_rms_norm", 1)),
             (l.axes, ("npu_rms_norm", 8), ("npu_rms_norm", 9)),
             (l.axes, ("npu_swiglu", 1), ("npu_swiglu", 0))],
    "routed experts": [(l.router, (2048, 1), (2049, 1)), (l.router, (3, 1), (2, 1))],
    "top-k": [(l.router, (48, 48), (48, 49)), (l.router, (48, 1), (48, 0))],
    "norm type": [(partial(l.router, 48, 3, norm_type=0), (), None),
                  (l.router, (48, 3), partial(l.router, 48, 3, norm_type=1))],
    "renorm": [(l.router, (48, 3), partial(l.router, 48, 3, renorm=1))],
    "expert ids": [(l.expert_ids, ("int32",), ("int64",))],
    "experts": [(l.routing, (10240,), (10241,)), (l.routing, (1,), (0,))],
    "drop pad mode": [(l.routing, (48,), partial(l.routing, 48, drop_pad_mode=1))],
    "token counts": [(l.routing, (48,), partial(l.routing, 48, tokens_num_type=0))],
    "groups": [(l.groups, (2, "int64"), (1, "int64"))],
    "group list": [(l.groups, (48, "int64"), (48, "int32"))],
    "group list type": [(l.groups, (48, "int64", 0), (48, "int64", 2))],
    "inner axis": [(l.inner_axis, ("npu_grouped_matmul", 65535), ("npu_grouped_matmul", 65536))],
    "NZ matrix": [(l.fractal, (2, 2), (1, 64)), (l.fractal, (64, 2), (64, 1))],
    "NZ format": [(l.fractal_format, (29,), (2,))],
    "rows a token": [(l.unpermuted, (512,), (513,))],
    "expert-parallel ranks": [(EP, (16,), (8,)), (EP, (64,), (65,)),
                              (partial(EP, version=2), (8,), (9,)),
                              (partial(EP, version=2), (2,), (1,))],
    "expert-parallel tokens": [(EP, (16,), partial(EP16, **{**ONE, "tokens": 257}))],
    "expert-parallel width": [(partial(EP16, **{**ONE, "hidden": 7168}), (),
                               partial(EP16, **{**ONE, "hidden": 7169}))],
    "expert-parallel top-k": [(partial(EP16, **{**ONE, "top_k": 16}), (),
                               partial(EP16, **{**ONE, "top_k": 17}))],
    "shared experts": [(EP, (16,), partial(EP16, **{**ONE, "shared_experts": 1}))],
    "dtype": [(l.computed, ("bfloat16",), ("float8_e4m3fn",)),
              (l.computed, ("float32",), ("float16",))],
    "wire dtype": [(l.wire, ("int8",), ("float8_e4m3fn",))],
    "weights": [(l.weights, ("int8", "bfloat16", "experts"), ("int8", "float32", "experts")),
                (l.weights, (None, "float32", "embed"), ("int8", "bfloat16", "embed")),
                (l.weights, ("auto", "float32", "linear"), ("float8_e4m3fn", "float32", "linear"))],
    "unified buffer": [(l.on_chip, ("unified buffer", 196608), ("unified buffer", 196609))],
    "L1": [(l.on_chip, ("L1", 524288), ("L1", 524289)),
           (l.decode_tile, (64, 256, 213), (64, 256, 214))],
    "L0A": [(l.on_chip, ("L0A", 65536), ("L0A", 65537))],
    "L0B": [(l.on_chip, ("L0B", 65536), ("L0B", 65537))],
    "L0C": [(l.on_chip, ("L0C", 131072), ("L0C", 131073)),
            (l.decode_tile, (128, 256, 0), (128, 256, 1))],
    "Triton decode": [(l.decode_cache, (1, 256, "bfloat16"), (2, 256, "bfloat16")),
                      (l.decode_cache, (1, 256, "bfloat16"), (1, 128, "bfloat16")),
                      (l.decode_cache, (1, 256, "bfloat16"), (1, 256, "float32"))],
    "Triton decode heads": [(l.decode_heads, (64,), (128,)), (l.decode_heads, (16,), (8,))],
    "Triton programs": [(l.programs, (65535,), (65536,)), (l.programs, (1,), (0,))],
}  # fmt: skip
"""By the limit's name: the function, arguments it takes, and arguments (or a call) it refuses."""

CASES = [(name, *case) for name, cases in BOUNDS.items() for case in cases]

NAMES = [f"{name} {number}" for name, cases in BOUNDS.items() for number in range(len(cases))]


@pytest.mark.parametrize(("name", "function", "good", "bad"), CASES, ids=NAMES)
def test_limit_takes_the_bound_and_refuses_the_next_value(name, function, good, bad):
    function(*good)
    if bad is None:
        return
    with pytest.raises(l.LimitExceeded) as refused:
        bad() if callable(bad) else function(*bad)
    assert refused.value.limit == name
    assert isinstance(refused.value, UnsupportedOp)
    said = str(refused.value)
    assert said.startswith(f"{name}: ")
    assert " refused; allowed: " in said and " (" in said and said.rpartition("; ")[2]


def test_message_names_value_source_and_what_to_change():
    with pytest.raises(l.LimitExceeded) as refused:
        l.head_ratio(128, 1)
    assert str(refused.value) == (
        "head ratio: 128 refused; allowed: 1 to 64 (DOCS npu_fused_infer_attention_score); split "
        "the query heads over 2 tensor-parallel ranks, the KV head copied"
    )


def test_every_limit_function_is_tried():
    tried = set()
    for cases in BOUNDS.values():
        for function, _, bad in cases:
            for f in (function, bad):
                while isinstance(f, partial):
                    f = f.func
                tried.add(getattr(f, "__name__", None))
    public = {n for n, f in vars(l).items()
              if callable(f) and getattr(f, "__module__", "") == l.__name__
              and not n.startswith("_") and not isinstance(f, type)}  # fmt: skip
    assert public - tried == {"padded_head_dim", "decode_bytes"}
