"""What the 910B's operators refuse, as functions of plain numbers: asked before any is called.

The op library's own shape functions do not hold these limits (128 heads over one and a head dim of
1024 pass them), so a call beyond one fails late, on the device, by number. Each error here names
the limit, the value, what is allowed, the source and what to change.

Sources: DOCS is ``_op_plugin_docs.py`` inside the wheel torch_npu 2.13.0, entry of the op's name;
ACLNN the CANN page of the op below it; FIELD is known from reports of its users.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from types import MappingProxyType
from typing import Literal

from step3_hetero.errors import UnsupportedOp

FUSED_ATTENTION = "DOCS npu_fused_infer_attention_score"
ROUTING = "DOCS npu_moe_init_routing_v2"
GROUPED = "DOCS npu_grouped_matmul"
DISPATCH = "ACLNN aclnnMoeDistributeDispatch"

MASK_SIDE = 2048
"""Rows and columns of the compressed causal mask."""

INT32_MAX = 2**31 - 1

NZ = 29
"""ACL's number of the fractal format, in which the cube unit reads a matrix without reordering."""

MOST_POSITIONS = 65536
"""Rows of the rotary table that a device holds: Step-3's max_position_embedding."""

FRACTAL = 16
"""Head dims of bfloat16 are multiples of this; shorter ones are padded with zeros."""

FRACTAL_INT8 = 32
"""The same of INT8 keys and values. The documents ask it of prompts only; held for all."""

PER_TOKEN_HEAD_PAGED = 5
"""key_antiquant_mode: a scale for each token and KV head, in pages as the codes are."""


class LimitExceeded(UnsupportedOp):
    """A call that the device would refuse. ``limit`` is the limit's name."""

    def __init__(self, limit: str, value: object, allowed: object, source: str, todo: str) -> None:
        super().__init__(f"{limit}: {value} refused; allowed: {allowed} ({source}); {todo}")
        self.limit = limit


def _most(limit: str, value: int, most: int, source: str, todo: str, least: int = 1) -> None:
    if not least <= value <= most:
        raise LimitExceeded(limit, f"{value:,}", f"{least:,} to {most:,}", source, todo)


def _one_of(limit: str, value: object, known: Collection[object], source: str, todo: str) -> None:
    if value not in known:
        raise LimitExceeded(limit, value, ", ".join(map(str, known)), source, todo)


# Attention


def head_ratio(heads: int, kv_heads: int) -> None:
    """At most 64 query heads read one KV head; Step-3's MFA is at the limit."""
    if kv_heads < 1 or heads % kv_heads:
        said = f"{heads} query heads over {kv_heads} KV heads"
        raise LimitExceeded("head ratio", said, "a whole ratio", FUSED_ATTENTION,
                            "change the model")  # fmt: skip
    ratio = heads // kv_heads
    todo = f"split the query heads over {-(-ratio // 64)} tensor-parallel ranks, the KV head copied"
    _most("head ratio", ratio, 64, FUSED_ATTENTION, todo)


def query_heads(heads: int) -> None:
    """At most 256 query heads."""
    todo = "split the query heads over tensor-parallel ranks"
    _most("query heads", heads, 256, FUSED_ATTENTION, todo)


def head_dim(size: int, kv: str = "bfloat16") -> None:
    """To 512, a multiple of 16, of 32 over an INT8 cache (padded_head_dim makes it one)."""
    _most("head dim", size, 512, FUSED_ATTENTION, "no operator of the 910B attends so wide")
    step = FRACTAL_INT8 if kv == "int8" else FRACTAL
    if size % step:
        todo = f"pad the heads to {padded_head_dim(size, kv)}"
        raise LimitExceeded("head dim", size, f"multiples of {step}", FUSED_ATTENTION, todo)


def padded_head_dim(size: int, kv: str = "bfloat16") -> int:
    """Return the next multiple of 16, of 32 for keys and values in INT8.

    >>> padded_head_dim(24), padded_head_dim(256), padded_head_dim(40, "int8")
    (32, 256, 64)
    """
    step = FRACTAL_INT8 if kv == "int8" else FRACTAL
    return -(-size // step) * step


def layout(name: str, size: int, *, paged: bool) -> None:
    """BNSD for a paged cache; TND has no pages and no head dim 256 (error 561002)."""
    if name == "TND" and size not in (64, 128, 192):
        raise LimitExceeded("layout", f"TND with head dim {size}", "TND with 64, 128 or 192",
                            "FIELD vllm-ascend: error 561002", "use BNSD")  # fmt: skip
    if name == "TND" and paged:
        raise LimitExceeded("layout", "TND with a block table", "TND without", FUSED_ATTENTION,
                            "use BNSD")  # fmt: skip
    known = ("BSH", "BSND", "BNSD", "BNSD_BSND", "TND")
    _one_of("layout", name, known, FUSED_ATTENTION, "use BNSD")


def block_size(size: int, queries: int, kv: str = "bfloat16") -> None:
    """16 to 512 by 16 for one query, INT8 by 32, 128 to 512 by 128 for several: 128 serves all."""
    step = (32 if kv == "int8" else 16) if queries == 1 else 128
    if size % step or not step <= size <= 512:
        said = f"{size} with {queries} queries"
        raise LimitExceeded("block size", said, f"{step} to 512 by {step}", FUSED_ATTENTION,
                            "use 128")  # fmt: skip


def block_table(shape: Sequence[int], dtype: str, seqs: int, blocks: int) -> None:
    """int32, one row for each sequence, at least as wide as the longest context has blocks."""
    if dtype != "int32" or len(shape) != 2 or shape[0] != seqs or shape[1] < blocks:
        wanted = f"int32 ({seqs}, {blocks} or more)"
        raise LimitExceeded("block table", f"{dtype} {tuple(shape)}", wanted, FUSED_ATTENTION,
                            "give a row of blocks for each sequence")  # fmt: skip


def kv_lengths(lengths: Sequence[int] | None, seqs: int, queries: int) -> None:
    """A paged cache needs one length for each sequence; a single query sees 262,144 keys."""
    if lengths is None or len(lengths) != seqs:
        given = "none" if lengths is None else len(lengths)
        raise LimitExceeded("KV lengths", given, f"one for each of {seqs} sequences",
                            FUSED_ATTENTION, "pass actual_seq_lengths_kv")  # fmt: skip
    if queries == 1 and lengths:
        todo = "set option kv_split, so that contexts are attended in parts"
        _most("KV lengths", max(lengths), 262144, FUSED_ATTENTION, todo, least=0)


def kv_scales(shape: Sequence[int] | None, dtype: str, query_dtype: str,
              cache: tuple[int, int, int], queries: int) -> None:  # fmt: skip
    """Scales of an INT8 cache of (blocks, kv_heads, block): that shape, float32; one query each.

    Prompts read no scales from pages.
    """
    todo = "compose a prompt's attention of products and softmax"
    _most("KV scales, queries", queries, 1, FUSED_ATTENTION, todo)
    _one_of("KV scales, query dtype", query_dtype, ("bfloat16",), FUSED_ATTENTION, "use bfloat16")
    if shape is None or dtype != "float32" or tuple(shape) != cache:
        given = "none" if shape is None else f"{dtype} {tuple(shape)}"
        raise LimitExceeded("KV scales", given, f"float32 {cache}", FUSED_ATTENTION,
                            "give one for each token and KV head")  # fmt: skip


def sequences(count: int) -> None:
    """At most 65,536 in one call."""
    _most("sequences", count, 65536, FUSED_ATTENTION, "lower runtime.max_batch")


def cache_elements(count: int) -> None:
    """The keys of one layer are counted by an int32."""
    _most("cache elements", count, INT32_MAX, FUSED_ATTENTION, "lower runtime.kv_blocks", least=0)


def flat_cache(kv_heads: int, size: int) -> None:
    """Several KV heads lie side by side in a row of the cache: under 65,536 columns."""
    todo = "split the KV heads over tensor-parallel ranks"
    _most("cache row", kv_heads * size, 65535, FUSED_ATTENTION, todo)


def mask(shape: Sequence[int] | None, dtype: str | None, sparse_mode: int) -> None:
    """sparse_mode 3 takes the compressed 2048 x 2048 mask, whatever the lengths."""
    _one_of("sparse mode", sparse_mode, (0, 1, 2, 3, 4), FUSED_ATTENTION, "use 3 for causal")
    side = (MASK_SIDE, MASK_SIDE)
    if sparse_mode in (2, 3, 4) and (shape is None or tuple(shape[-2:]) != side or len(shape) > 4):
        given = None if shape is None else tuple(shape)
        raise LimitExceeded("mask", given, side, FUSED_ATTENTION,
                            "pass the upper triangle of 2048 x 2048")  # fmt: skip
    if shape is not None:
        _one_of("mask", dtype, ("bool", "int8", "uint8"), FUSED_ATTENTION, "make it bool")


def cache_mode(mode: str | None) -> None:
    """The default, PA_NZ, stores another order of bytes than the attention here reads."""
    source = "DOCS npu_scatter_pa_kv_cache"
    _one_of("cache mode", mode, ("Norm",), source, "pass cache_mode='Norm'")


def slots(dtype: str) -> None:
    """Slots are int32 or int64."""
    source = "DOCS npu_scatter_pa_kv_cache"
    _one_of("slots", dtype, ("int32", "int64"), source, "cast the slots to int32")


# Rotation and norm


def rotary(size: int, heads: int, op: str = "npu_rotary_mul") -> None:
    """npu_rotary_mul: even, under 896, under 1000 heads; npu_apply_rotary_pos_emb: 64 or 128."""
    if op == "npu_apply_rotary_pos_emb":
        _one_of("rotary", size, (64, 128), f"DOCS {op}", "use npu_rotary_mul")
        return
    if size % 2 or not 2 <= size < 896:
        said, todo = f"head dim {size}", "no operator of the 910B rotates it"
        raise LimitExceeded("rotary", said, "even, under 896", f"DOCS {op}", todo)
    _most("rotary", heads, 999, f"DOCS {op}", "split the heads over tensor-parallel ranks")


def positions(last: int) -> None:
    """Angles are looked up in a table made on the host in float64: the 910B has no such cosine."""
    todo = "raise MOST_POSITIONS in backends/ascend/limits.py; the table's memory grows with it"
    _most("positions", last, MOST_POSITIONS - 1, "the table of this backend", todo, least=0)


def axes(op: str, count: int) -> None:
    """npu_rms_norm takes 2 to 8 axes, npu_swiglu 1 to 8."""
    least = 2 if op == "npu_rms_norm" else 1
    _most("axes", count, 8, f"DOCS {op}", "reshape to rows", least=least)


# Experts


def router(experts: int, top_k: int, *, norm_type: int = 0, renorm: int = 0) -> None:
    """3 to 2048 experts in one group; top-k among them; softmax first, no renormalisation."""
    source = "DOCS npu_moe_gating_top_k"
    _most("routed experts", experts, 2048, source, "no operator routes more", least=3)
    _most("top-k", top_k, experts, source, "choose at most as many as there are")
    _one_of("norm type", norm_type, (0,), source, "Step-3's router is a softmax: pass 0")
    _one_of("renorm", renorm, (0,), source, "divide the weights by their sum afterwards")


def expert_ids(dtype: str) -> None:
    """Expert ids are int32 throughout."""
    _one_of("expert ids", dtype, ("int32",), ROUTING, "cast the ids to int32")


def routing(experts: int, *, drop_pad_mode: int = 0, tokens_num_type: int = 1) -> None:
    """To 10,240 experts, dropless, counts and not their sums."""
    _most("experts", experts, 10240, ROUTING, "no operator routes more")
    _one_of("drop pad mode", drop_pad_mode, (0,), ROUTING, "pass 0: no row is dropped")
    _one_of("token counts", tokens_num_type, (1, 2), ROUTING, "pass 1: a count for each expert")


def groups(count: int, dtype: str, list_type: int = 1) -> None:
    """Counts of at least two groups, int64."""
    _most("groups", count, 10240, GROUPED, "one expert is a plain product", least=2)
    _one_of("group list", dtype, ("int64",), GROUPED, "leave the counts as the routing gives them")
    _one_of("group list type", list_type, (0, 1), GROUPED, "pass 1: counts")


def inner_axis(op: str, size: int) -> None:
    """The last axis of either operand lies under 65,536."""
    _most("inner axis", size, 65535, f"DOCS {op}", "split the matrix over tensor-parallel ranks")


def fractal(rows: int, columns: int) -> None:
    """A product takes a fractal matrix of 2 x 2 or more."""
    source = "FIELD vllm-ascend 10287: aclnnMatmulWeightNz"
    _most("NZ matrix", min(rows, columns), INT32_MAX, source, "leave option nz off", least=2)


def fractal_format(number: int) -> None:
    """The cast leaves the format as it is, without a word, while internal formats are forbidden."""
    source = "FIELD vllm-ascend 2549"
    todo = "set torch.npu.config.allow_internal_format, or leave option nz off"
    _one_of("NZ format", number, (NZ,), source, todo)


def unpermuted(top_k: int) -> None:
    """At most 512 rows a token are added up."""
    source = "DOCS npu_moe_token_unpermute"
    _most("rows a token", top_k, 512, source, "choose fewer experts")


def expert_parallel(
    ranks: int, *, tokens: int, hidden: int, top_k: int, shared_experts: int, version: int = 1
) -> None:
    """Dispatch and combine: the ranks, tokens, width and top-k of one call; no shared expert."""
    known = (16, 32, 64) if version == 1 else (2, 3, 4, 5, 6, 7, 8, 16, 32, 64)
    todo = "use another number of ranks" if version > 1 else "use version 2, or 16, 32 or 64 ranks"
    _one_of("expert-parallel ranks", ranks, known, DISPATCH, todo)
    _most("expert-parallel tokens", tokens, 256, DISPATCH, "lower runtime.max_batch")
    _most("expert-parallel width", hidden, 7168, DISPATCH, "no operator takes wider rows")
    _most("expert-parallel top-k", top_k, 16, DISPATCH, "choose fewer experts")
    todo = "compute the shared expert outside, beside the routed ones"
    _most("shared experts", shared_experts, 0, DISPATCH, todo, least=0)


# Dtypes

COMPUTED = ("float32", "bfloat16")
WEIGHT_FORMATS = ("auto", "float32", "bfloat16", "int8")


def computed(dtype: str) -> None:
    """float32 and bfloat16; the 910B has no FP8 arithmetic, and float64 only in software."""
    todo = "set runtime.dtype to bf16 or fp32"
    _one_of("dtype", dtype, COMPUTED, "CANN: Atlas A2", todo)


def wire(dtype: object) -> None:
    """Quantised arrays are INT8: the 910B has no FP8."""
    todo = "set the wire dtype to int8 or bf16"
    _one_of("wire dtype", dtype, ("int8",), "CANN: Atlas A2 has no FP8", todo)


def kv_format(form: str | None, dtype: str) -> None:
    """As the activations, bfloat16, or INT8 with a scale for each token and KV head; no FP8."""
    known = (*COMPUTED, "int8") if dtype == "float32" else ("bfloat16", "int8")
    todo = "set runtime.kv_dtype to auto, bf16 or int8"
    _one_of("KV dtype", form or dtype, known, "CANN: Atlas A2 has no FP8", todo)


def graph_dtype(dtype: str) -> None:
    """Only the fused operator's attention is captured; float32 is composed context by context."""
    todo = "set runtime.dtype to bf16, or leave option graphs off"
    _one_of("graphs, attention dtype", dtype, ("bfloat16",), "this backend", todo)


def weights(form: str | None, dtype: str, op: str) -> None:
    """As stored by the role: float32, bfloat16, or INT8 for bfloat16 products."""
    todo = "FP8 checkpoints are requantised at load: use auto, bf16 or int8"
    _one_of("weights", form or "auto", WEIGHT_FORMATS, "CANN: Atlas A2 has no FP8", todo)
    if form == "int8" and (dtype != "bfloat16" or op not in ("linear", "experts")):
        source = "DOCS npu_quant_matmul"
        raise LimitExceeded("weights", f"int8 for {op} in {dtype}",
                            "int8 for linear and experts in bfloat16", source,
                            "set runtime.dtype to bf16")  # fmt: skip


# On-chip memory: the compiler's target tables for 910B1 to 910B4

Memory = Literal["unified buffer", "L1", "L0A", "L0B", "L0C"]

ON_CHIP_BYTES = MappingProxyType(
    {"unified buffer": 192 << 10, "L1": 512 << 10, "L0A": 64 << 10, "L0B": 64 << 10,
     "L0C": 128 << 10}
)  # fmt: skip
"""Bytes of each memory beside one core."""


def on_chip(memory: Memory, nbytes: int) -> None:
    """A kernel's tiles have to fit the memory they are computed in."""
    source = "bishengir-compile 1.2.0, target tables"
    _most(memory, nbytes, ON_CHIP_BYTES[memory], source, "use smaller tiles", least=0)


# The Triton decode kernel (kernels/attention.py)

PLANNED = "bishengir-compile 1.2.0, tests/ascend/t3/plans.json"


def decode_cache(kv_heads: int, head_dim: int, dtype: str) -> None:
    """One KV head of 256 in bfloat16: MFA."""
    if (kv_heads, head_dim, dtype) != (1, 256, "bfloat16"):
        said = f"{kv_heads} KV heads of {head_dim}, {dtype}"
        raise LimitExceeded("Triton decode", said, "1 KV head of 256, bfloat16", PLANNED,
                            "leave option triton off")  # fmt: skip


def decode_heads(heads: int) -> None:
    """64 query heads, or what 2 or 4 tensor-parallel ranks hold of them."""
    _one_of("Triton decode heads", heads, (16, 32, 64), PLANNED, "leave option triton off")


def decode_tile(heads: int, head_dim: int, tile: int) -> None:
    """The matrices beside the cube unit fit: see ``decode_bytes``. Queries hold L1 throughout."""
    for memory, nbytes in decode_bytes(heads, head_dim, tile).items():
        on_chip(memory, nbytes)


def decode_bytes(heads: int, head_dim: int, tile: int) -> dict[Memory, int]:
    """Return the bytes of queries, keys, values, weights (L1) and of the two products (L0C).

    What the vector units hold is the compiler's choice and stands in its plan alone. Keys, values
    and weights are held twice: one is loaded while the other is multiplied.

    >>> decode_bytes(64, 256, 128)
    {'L1': 327680, 'L0C': 98304}
    """
    bfloat16, float32 = 2, 4
    tiles = 2 * tile * head_dim + heads * tile
    return {
        "L1": (heads * head_dim + 2 * tiles) * bfloat16,
        "L0C": heads * (tile + head_dim) * float32,
    }


def programs(count: int) -> None:
    """A launch has at most 65,535 programs."""
    source = "triton-ascend 3.2.0, runtime/jit.py"
    todo = "lower runtime.max_batch, or raise option kv_split"
    _most("Triton programs", count, 65535, source, todo)
