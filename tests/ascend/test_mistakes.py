"""Mistakes a caller can make: each refused by name before the operator, and by the operator too."""

import pytest
import torch

from step3_hetero.backends.ascend import vendor
from step3_hetero.backends.ascend.attention import causal_mask
from step3_hetero.backends.ascend.limits import LimitExceeded

BF16 = torch.bfloat16


def on(*shape, dtype=BF16):
    """Return ones on the device."""
    return torch.ones(shape, dtype=dtype).to("npu")


def ints(*values, dtype=torch.int32):
    """Return integers on the device."""
    return torch.tensor(values, dtype=dtype).to("npu")


def attend(heads=64, size=256, queries=1, block=128, **changes):
    """Call the fused attention over one block of a paged cache, with one thing changed."""
    device = torch.device("npu", 0)
    given = {
        "kv_heads": 1, "scale": 0.0625, "block_table": ints([0]), "block_size": block,
        "kv_lengths": [block], "mask": causal_mask(device) if queries > 1 else None,
        "sparse_mode": 3 if queries > 1 else 0,
    }  # fmt: skip
    cache = on(1, 1, block, size)
    return vendor.fused_attention(on(1, heads, queries, size), cache, cache, **given | changes)


def attend_int8(size=256, queries=1, block=128, dtype=torch.float32, shape=None, **changes):
    """Call it over one block of INT8 codes and their scales, with one thing changed."""
    cache = on(1, 1, block, size, dtype=torch.int8)
    scale = on(*(shape or (1, 1, block)), dtype=dtype)
    given = {"kv_heads": 1, "scale": 0.0625, "block_table": ints([0]), "block_size": block,
             "kv_lengths": [block], "scales": (scale, scale),
             "mask": causal_mask(torch.device("npu", 0)) if queries > 1 else None,
             "sparse_mode": 3 if queries > 1 else 0}  # fmt: skip
    return vendor.fused_attention(on(1, 64, queries, size), cache, cache, **given | changes)


def scatter(**changes):
    """Write one row of a cache, with one thing changed."""
    given = {"slots": ints(3), **changes}
    vendor.write_cache(
        on(1, 1, 256), on(1, 1, 256), on(2, 128, 1, 256), on(2, 128, 1, 256), **given
    )


def rotated(size=256, heads=64, **changes):
    """Rotate one token's heads."""
    x, turned = on(1, 1, heads, size), on(1, 1, 1, size)
    return vendor.rotate(x, turned, turned, **changes)


def routed(experts=48, top_k=3, **changes):
    """Choose experts for one token."""
    return vendor.top_experts(on(1, experts, dtype=torch.float32), top_k, **changes)


def gathered(dtype=torch.int32, experts=49, **changes):
    """Gather two tokens by expert."""
    return vendor.gather_by_expert(on(2, 64), ints([0, 1], [1, 2], dtype=dtype), experts, **changes)


def grouped(groups=2, columns=32, dtype=torch.int64):
    """Multiply four rows by two matrices."""
    counts = ints(*[1] * groups, dtype=dtype)
    return vendor.grouped_product(on(4, 64), on(groups, 64, columns), counts)


GOOD = [attend, attend_int8, scatter, rotated, routed, gathered, grouped,
        lambda: attend(queries=5), lambda: attend(heads=32, queries=5)]  # fmt: skip

MISTAKES = {
    "TND for head dim 256": ("layout", lambda: attend(layout="TND")),
    "TND with a block table": ("layout", lambda: attend(layout="TND", size=128)),
    "a layout that does not exist": ("layout", lambda: attend(layout="NBSD")),
    "128 query heads over one": ("head ratio", lambda: attend(heads=128)),
    "257 query heads": ("query heads", lambda: attend(heads=257)),
    "head dim 528": ("head dim", lambda: attend(size=528)),
    "head dim 24, not padded": ("head dim", lambda: attend(size=24)),
    "block size 64 in a prefill": ("block size", lambda: attend(queries=5, block=64)),
    "block size 8": ("block size", lambda: attend(block=8)),
    "block size 1024": ("block size", lambda: attend(block=1024)),
    "int64 block table": (
        "block table",
        lambda: attend(block_table=ints([0], dtype=torch.int64)),
    ),
    "block table of one axis": ("block table", lambda: attend(block_table=ints(0))),
    "a context longer than its blocks": ("block table", lambda: attend(kv_lengths=[129])),
    "no KV lengths": ("KV lengths", lambda: attend(kv_lengths=None)),
    "no KV length for a sequence": ("KV lengths", lambda: attend(kv_lengths=[])),
    "a mask of the batch's own shape": (
        "mask",
        lambda: attend(queries=5, mask=on(5, 128, dtype=torch.bool)),
    ),
    "no mask in a causal prefill": ("mask", lambda: attend(queries=5, mask=None)),
    "a mask of numbers": ("mask", lambda: attend(queries=5, mask=on(2048, 2048))),
    "a sparse mode of prefixes": ("sparse mode", lambda: attend(queries=5, sparse_mode=5)),
    "INT8 keys without scales": ("KV scales", lambda: attend_int8(scales=None)),
    "scales of INT8 keys in bfloat16": ("KV scales", lambda: attend_int8(dtype=BF16)),
    "scales token by token, not by head": (
        "KV scales",
        lambda: attend_int8(shape=(1, 128)),
    ),
    "INT8 keys in a prefill": ("KV scales, queries", lambda: attend_int8(queries=5)),
    "head dim 48 of INT8 keys": ("head dim", lambda: attend_int8(size=48)),
    "block size 16 of INT8 keys": ("block size", lambda: attend_int8(block=16)),
    "the default cache mode": ("cache mode", lambda: scatter(cache_mode="PA_NZ")),
    "slots in int16": ("slots", lambda: scatter(slots=ints(3, dtype=torch.int16))),
    "npu_apply_rotary_pos_emb with 256": (
        "rotary",
        lambda: rotated(op="npu_apply_rotary_pos_emb"),
    ),
    "an odd head dim": ("rotary", lambda: rotated(size=25)),
    "head dim 896": ("rotary", lambda: rotated(size=896)),
    "a thousand heads": ("rotary", lambda: rotated(heads=1000)),
    "a sigmoid router": ("norm type", lambda: routed(norm_type=1)),
    "renormalised by the operator": ("renorm", lambda: routed(renorm=1)),
    "more experts chosen than there are": ("top-k", lambda: routed(top_k=49)),
    "2049 experts": ("routed experts", lambda: routed(experts=2049)),
    "int64 expert ids": ("expert ids", lambda: gathered(dtype=torch.int64)),
    "rows dropped": ("drop pad mode", lambda: gathered(drop_pad_mode=1)),
    "counts of one group": ("groups", lambda: grouped(groups=1)),
    "counts in int32": ("group list", lambda: grouped(dtype=torch.int32)),
    "an inner axis of 65536": ("inner axis", lambda: grouped(columns=65536)),
}


@pytest.mark.parametrize("call", GOOD)
def test_what_is_right_passes(call):
    call()


@pytest.mark.parametrize(("limit", "call"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_is_refused_by_the_limits_name(limit, call):
    with pytest.raises(LimitExceeded) as refused:
        call()
    assert refused.value.limit == limit


@pytest.mark.parametrize(("limit", "call"), MISTAKES.values(), ids=MISTAKES)
def test_the_operator_refuses_it_too(limit, call, monkeypatch):
    for name in vars(vendor.limits):
        if callable(getattr(vendor.limits, name)) and not name.startswith("_"):
            monkeypatch.setattr(vendor.limits, name, lambda *_, **__: None)
    with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
        call()
