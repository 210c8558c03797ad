"""What ``bench.gpu`` times: MFA decode, experts and a layer of ours, and the same by libraries.

Written without a card and never run on one; tests/cuda/test_bench.py runs it all at tiny sizes on
the host, where the kernels are interpreted, with stand-ins for the libraries that need a card.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from step3_hetero.backend import BatchMeta
from step3_hetero.backends.cuda.linear import Codes, Integers, LinearWeights
from step3_hetero.backends.cuda.moe import ExpertWeights
from step3_hetero.specs import AttentionSpec, CacheSpec, FfnSpec, Limits, RouterSpec

BLOCK = 128
"""Tokens of a logical block; rows of a tile in the libraries' grouped products."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model's layer and of the batch; ``tokens_each`` are those of an expert."""

    hidden: int
    heads: int
    head_dim: int
    q_rank: int
    inter: int
    experts: int
    top_k: int
    context: int
    batch: int
    tokens_each: int
    copied_bytes: int
    square: int

    @property
    def tokens(self) -> int:
        """Return the tokens that give every expert its ``tokens_each``."""
        return self.tokens_each * self.experts // self.top_k


STEP3 = Sizes(7168, 64, 256, 2048, 5120, 48, 3, 8192, 64, 128, 1 << 30, 8192)
"""Step-3's (arXiv 2507.19427 and the published configuration) at 8K context and batch 64."""


class NotThere(Exception):
    """A library that is not installed, or a card's feature that is not there: a line says so."""


@dataclass(frozen=True)
class Work:
    """One thing to time, with the bytes that it must move and the FLOP that it must do.

    ``target`` is the part of its bound that a kernel of ours is meant to reach; ``against`` names
    the line of a library whose speed a kernel of ours is meant to reach ``target`` of instead.
    """

    call: Callable[[], Any]
    nbytes: int
    flops: int
    target: float | None = None
    against: str | None = None


class Job(NamedTuple):
    """A line: its name, what allocates its arrays when its turn comes, whose kernels it times."""

    name: str
    make: Callable[[], Work]
    ours: bool = True


GROUPED = "experts: torch grouped_mm, bfloat16"


def jobs(device: Any, sizes: Sizes) -> Iterator[Job]:
    """Yield what is timed after bandwidth and peak, targets first: time may run out."""
    for held in ("bfloat16", "float8_e4m3fn", "int8"):
        yield Job(f"MFA decode, KV {held}", partial(_decode, device, sizes, held))
    yield Job(GROUPED, partial(_grouped, device, sizes), ours=False)
    for held in ("plain", "e4m3", "int8", "e4m3 x e4m3"):
        yield Job(f"experts, weights {held}", partial(_experts, device, sizes, held))
    for held in ("plain", "e4m3"):
        name = f"layer, attention and FFN, experts {held}"
        yield Job(name, partial(_layer, device, sizes, held))
    for name, make in (
        ("decode: torch SDPA, heads as rows", _sdpa),
        ("decode: FlashInfer, paged", _flashinfer),
        ("decode: FlashAttention, paged", _flash_attention),
        ("experts: DeepGEMM, block FP8", _deep_gemm),
    ):
        yield Job(name, partial(make, device, sizes), ours=False)


def installed(name: str) -> Any:
    """Import a library.

    Raises:
        NotThere: it is not installed, or does not import; with the reason.
    """
    if find_spec(name) is None:
        raise NotThere(f"{name} is not installed")
    try:
        return importlib.import_module(name)
    except Exception as error:  # a library built for another CUDA raises what it likes
        raise NotThere(f"{name} does not import: {error}") from error


def randn(device: Any, *shape: int) -> Tensor:
    """Return bfloat16 numbers of ordinary size on the device."""
    return torch.randn(shape, device=device.place, dtype=torch.bfloat16)


def _meta(s: Sizes) -> BatchMeta:
    blocks = -(-s.context // BLOCK)
    tables = np.arange(s.batch * blocks).reshape(s.batch, blocks)
    slots = tables[:, -1] * BLOCK + (s.context - 1) % BLOCK
    arrays = (np.full(s.batch, s.context - 1), slots, np.arange(s.batch + 1),
              np.full(s.batch, s.context), tables)  # fmt: skip
    return BatchMeta(*(x.astype(np.int32) for x in arrays))


def _decode_flops(s: Sizes) -> int:
    return 4 * s.batch * s.heads * s.head_dim * s.context


def _cache(device: Any, s: Sizes, held: str) -> Any:
    return device.open_cache(CacheSpec(1, s.head_dim, s.batch * -(-s.context // BLOCK), held))


def _decode(device: Any, s: Sizes, held: str) -> Work:
    cache, batch = _cache(device, s, held), device.batch(_meta(s))
    q = randn(device, s.batch, s.heads, s.head_dim)
    call = partial(device.kernel("attention"), q, cache, batch, scale=s.head_dim**-0.5)
    return Work(call, cache.spec.nbytes, _decode_flops(s), target=0.8)


def _plain_kv(device: Any, s: Sizes, page: int) -> tuple[Tensor, Tensor]:
    pages = s.batch * -(-s.context // page)
    return randn(device, pages, page, 1, s.head_dim), randn(device, pages, page, 1, s.head_dim)


def _sdpa(device: Any, s: Sizes) -> Work:
    k, v = (randn(device, s.batch, 1, s.context, s.head_dim) for _ in "kv")
    rows = randn(device, s.batch, 1, s.heads, s.head_dim)  # query heads as rows of one head
    call = partial(F.scaled_dot_product_attention, rows, k, v)
    return Work(call, k.nbytes + v.nbytes, _decode_flops(s))


def _flashinfer(device: Any, s: Sizes) -> Work:
    """docs.flashinfer.ai, decode: pages of one sequence lie one after another."""
    library, page = installed("flashinfer"), 16
    each = -(-s.context // page)
    kv = torch.stack(_plain_kv(device, s, page), 1)  # (pages, 2, page, kv_heads, head_dim)
    space = torch.empty(128 << 20, dtype=torch.uint8, device=device.place)
    wrapper = library.BatchDecodeWithPagedKVCacheWrapper(space, "NHD", use_tensor_cores=True)
    starts = torch.arange(s.batch + 1, dtype=torch.int32, device=device.place) * each
    pages = torch.arange(s.batch * each, dtype=torch.int32, device=device.place)
    last = torch.full((s.batch,), s.context - (each - 1) * page, dtype=torch.int32,
                      device=device.place)  # fmt: skip
    wrapper.plan(starts, pages, last, s.heads, 1, s.head_dim, page,
                 q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)  # fmt: skip
    q = randn(device, s.batch, s.heads, s.head_dim)
    return Work(partial(wrapper.run, q, kv), kv.nbytes, _decode_flops(s))


def _flash_attention(device: Any, s: Sizes) -> Work:
    """FlashAttention 2: pages are multiples of 256."""
    library, page = installed("flash_attn"), 256
    k, v = _plain_kv(device, s, page)
    table = torch.arange(len(k), dtype=torch.int32, device=device.place).view(s.batch, -1)
    lengths = torch.full((s.batch,), s.context, dtype=torch.int32, device=device.place)
    q = randn(device, s.batch, 1, s.heads, s.head_dim)
    call = partial(library.flash_attn_with_kvcache, q, k, v, cache_seqlens=lengths,
                   block_table=table, causal=True)  # fmt: skip
    return Work(call, k.nbytes + v.nbytes, _decode_flops(s))


def _stack(device: Any, s: Sizes, held: str) -> ExpertWeights:
    if held == "e4m3 x e4m3" and "float8_e4m3fn" not in device.info.dtypes.computed:
        raise NotThere(str(device.info.description))
    shapes = {"gate": (s.experts, s.inter, s.hidden), "up": (s.experts, s.inter, s.hidden),
              "down": (s.experts, s.hidden, s.inter)}  # fmt: skip
    parts: dict[str, Any] = {n: _held(device, shape, held) for n, shape in shapes.items()}
    return ExpertWeights(
        **parts, dtype=torch.bfloat16, arch=device.arch, quantised=held == "e4m3 x e4m3",
        source={}, method=held, nbytes=sum(p.nbytes for p in parts.values()),
    )  # fmt: skip


def _held(device: Any, shape: tuple[int, ...], held: str) -> Tensor | Codes | Integers:
    """Return weights of ordinary size in one of the formats, made on the device."""
    if held == "plain":
        drawn: Tensor = randn(device, *shape) * shape[-1] ** -0.5
        return drawn
    if held == "int8":
        part = Integers(shape, device.place)
        part.codes.random_(-127, 128)
        part.scales.fill_(shape[-1] ** -0.5 / 64)
        return part
    codes = torch.randint(0, 120, shape, dtype=torch.uint8, device=device.place)
    runs = (*shape[:-2], -(-shape[-2] // BLOCK), -(-shape[-1] // BLOCK))
    return Codes(codes, torch.full(runs, shape[-1] ** -0.5, device=device.place))


def _routed(device: Any, s: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """Return u, weights and ids: every expert gets exactly ``tokens_each`` tokens."""
    slots = torch.arange(s.tokens * s.top_k, dtype=torch.int32) % s.experts
    ids = slots.view(s.tokens, s.top_k).to(device.place)
    share = torch.full(ids.shape, 1 / s.top_k, dtype=torch.bfloat16, device=device.place)
    return randn(device, s.tokens, s.hidden), share, ids


def _experts_flops(s: Sizes) -> int:
    return 6 * s.tokens * s.top_k * s.hidden * s.inter


def _experts(device: Any, s: Sizes, held: str) -> Work:
    stack, routed = _stack(device, s, held), _routed(device, s)
    call = partial(device.kernel("experts"), *routed, stack)
    against = GROUPED if held == "plain" else None
    return Work(call, stack.nbytes, _experts_flops(s), target=0.7, against=against)


def _grouped(device: Any, s: Sizes) -> Work:
    """The whole op by torch: rows gathered by expert, three grouped products, weighted sum."""
    grouped = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if grouped is None:
        raise NotThere(f"torch {torch.__version__} has no grouped_mm")
    stack, (u, share, ids) = _stack(device, s, "plain"), _routed(device, s)
    parts: tuple[Any, ...] = (stack.gate, stack.up, stack.down)
    gate, up, down = (part.transpose(1, 2) for part in parts)

    def call() -> Tensor:
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        ends = torch.bincount(flat, minlength=s.experts).cumsum(0).int()
        rows, token = u[order // s.top_k], order // s.top_k
        inner = F.silu(grouped(rows, gate, offs=ends)) * grouped(rows, up, offs=ends)
        found = grouped(inner, down, offs=ends) * share.flatten()[order, None]
        return torch.zeros_like(u).index_add_(0, token, found)

    return Work(call, stack.nbytes, _experts_flops(s))


def _deep_gemm(device: Any, s: Sizes) -> Work:
    """The three products alone, over rows that lie by expert; nothing is gathered or quantised."""
    product = installed("deep_gemm").m_grouped_fp8_gemm_nt_contiguous
    stack = _stack(device, s, "e4m3")
    rows = s.tokens * s.top_k
    expert = torch.arange(s.experts, dtype=torch.int32, device=device.place)
    expert = expert.repeat_interleave(s.tokens_each)

    def of(part: Any, n: int, k: int) -> Callable[[], Any]:
        codes = torch.randint(0, 120, (rows, k), dtype=torch.uint8, device=device.place)
        x = (codes.view(torch.float8_e4m3fn), torch.ones(rows, k // BLOCK, device=device.place))
        w = (part.codes.view(torch.float8_e4m3fn), part.scales)
        out = torch.empty(rows, n, dtype=torch.bfloat16, device=device.place)
        return partial(product, x, w, out, expert)

    calls = [of(stack.gate, s.inter, s.hidden), of(stack.up, s.inter, s.hidden),
             of(stack.down, s.hidden, s.inter)]  # fmt: skip
    return Work(lambda: [one() for one in calls], stack.nbytes, _experts_flops(s))


def _linear(device: Any, out: int, columns: int, dtype: torch.dtype) -> LinearWeights:
    matrix = (randn(device, out, columns) * columns**-0.5).to(dtype)
    return LinearWeights(matrix, (), None, dtype, device.arch, {}, str(dtype), matrix.nbytes)


def _layer(device: Any, s: Sizes, held: str) -> Work:
    """One MoE layer of the batch's decode step through the stages that the engine runs."""
    half = torch.bfloat16
    router = RouterSpec(s.experts, s.top_k, False, "float32")
    attention = AttentionSpec("bfloat16", s.hidden, s.heads, 1, s.head_dim, s.q_rank, 1e-5, 5e5,
                              s.context, True, router)  # fmt: skip
    ffn = FfnSpec("bfloat16", s.hidden, s.inter, s.experts, s.top_k, s.inter)
    ones = {n: torch.ones(width, device=device.place, dtype=half)
            for n, width in (("input_norm", s.hidden), ("post_norm", s.hidden),
                             ("inter_norm", s.q_rank))}  # fmt: skip
    first = {
        "qkv": _linear(device, s.q_rank + 2 * s.head_dim, s.hidden, half),
        "wq": _linear(device, s.heads * s.head_dim, s.q_rank, half),
        "o_proj": _linear(device, s.hidden, s.heads * s.head_dim, half),
        "router": _linear(device, s.experts, s.hidden, torch.float32),
    }
    shared = {
        "shared_gate_up": _linear(device, 2 * s.inter, s.hidden, half),
        "shared_down": _linear(device, s.hidden, s.inter, half),
    }
    second = {**shared, "experts": _stack(device, s, held)}
    cache, meta = _cache(device, s, "bfloat16"), _meta(s)
    limits = Limits(s.batch, s.batch, meta.block_tables.shape[1])
    stages = (device.build(attention, {**first, **ones}, cache, limits),
              device.build(ffn, second, None, limits))  # fmt: skip
    for stage in stages:
        stage.plan(meta)
    x, y = (randn(device, s.batch, s.hidden) for _ in "xy")

    def call() -> Any:
        sent = stages[0].run({"x": x.clone(), "y": y})
        return sent, stages[1].run({n: sent[n] for n in ("u", "weights", "ids")})

    chosen = len(call()[0]["ids"].unique())  # experts that nobody chose are not read
    weights = sum(w.nbytes for w in (*first.values(), *second.values()))
    weights -= second["experts"].nbytes * (s.experts - chosen) // s.experts
    matrices = [w.matrix for w in (*first.values(), *shared.values())]
    dense = sum(m.numel() for m in matrices if m is not None)
    flops = 2 * s.batch * (dense + 3 * s.top_k * s.hidden * s.inter) + _decode_flops(s)
    return Work(call, weights + cache.spec.nbytes, flops)
