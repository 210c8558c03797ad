"""Every kernel at every configuration, called at the sizes of Step-3 on tensors without memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from step3_hetero.backend import BatchMeta
from step3_hetero.backends.cuda import attention, linear, moe, norm, rope, rows, vision
from step3_hetero.backends.cuda.cards import FP8_ARCH
from step3_hetero.backends.cuda.kernels import rows as row_kernels
from step3_hetero.backends.cuda.launch import Launch, launch, recording, tile
from step3_hetero.specs import CacheSpec

META = torch.device("meta")

HIDDEN, INTER, EXPERTS, TOP_K = 7168, 5120, 48, 3
HEADS, HEAD_DIM, THETA = 64, 256, 5e5
VISION_WIDTH, VISION_HEADS, VISION_TOKENS, VISION_INTER = 1792, 16, 2708, 15360
"""Step-3's own sizes (arXiv 2507.19427 and the published configuration)."""

DECODING, CONTEXT = 64, 8192
"""Sequences of a decode step and their length; a prompt's chunk has PROMPT tokens."""

PROMPT = 512

FEW = 4
"""Sequences whose keys are split, on either card."""


@dataclass(frozen=True)
class Job:
    """One launch as a card of ``arch`` would make it, by a name that says what it is."""

    name: str
    arch: int
    launch: Launch


def jobs(arch: int) -> list[Job]:
    """Return every launch to be compiled for ``arch``; equal ones once."""
    found: list[Job] = []
    for name, call in _calls(arch):
        with recording(arch) as launches:
            call()
        found += [Job(f"{name}: {_called(made)}", arch, made) for made in launches]
    unique = {(j.launch.kernel.fn.__name__, _key(j.launch)): j for j in reversed(found)}
    return list(reversed(unique.values()))


def _called(made: Launch) -> str:
    """Return a kernel's name, and that it is the gated one of two."""
    name: str = made.kernel.fn.__name__
    return f"{name}, gated" if made.constants.get("GATED") else name


def _key(made: Launch) -> tuple[object, ...]:
    """Return what makes two launches the same binary: types, divisibility, constants."""
    kinds = tuple(
        x.dtype if isinstance(x, Tensor) else (type(x), x == 1, x % 16 == 0) for x in made.args
    )
    meta = {} if made.configuration is None else made.configuration.meta
    return kinds, tuple(sorted({**made.constants, **meta}.items()))


Calls = Iterator[tuple[str, Callable[[], object]]]


def _calls(arch: int) -> Calls:
    for dtype in (torch.bfloat16, torch.float32):
        said = str(dtype).removeprefix("torch.")
        yield from _rows(said, dtype)
        yield from _attention(arch, said, dtype)
        yield from _moe(arch, said, dtype)
        yield from _vision(said, dtype)


def _new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def _rows(said: str, dtype: torch.dtype) -> Calls:
    x, weight = _new(DECODING, HIDDEN, dtype=dtype), _new(HIDDEN, dtype=dtype)
    low, narrow = _new(DECODING, 2048, dtype=dtype), _new(2048, dtype=dtype)
    q = _new(DECODING, HEADS, HEAD_DIM, dtype=dtype)
    index = _new(169, dtype=torch.int32)
    both = _new(DECODING, 2 * INTER, dtype=dtype)
    yield f"rms_norm {said}", lambda: norm.rms_norm(x, weight, eps=1e-5)
    yield f"inter_norm {said}", lambda: norm.rms_norm(low, narrow, eps=1e-5)
    yield f"add, rms_norm {said}", lambda: norm.add_rms_norm(x, x, weight, eps=1e-5)
    yield f"rope {said}", lambda: rope.rope(q, _new(DECODING, dtype=torch.int32), theta=THETA)
    yield f"merge_rows {said}", lambda: rows.merge_rows(x, _new(169, HIDDEN, dtype=dtype), index)
    yield f"swiglu {said}", lambda: moe.swiglu(both)
    for wire, held in (("float8_e4m3fn", torch.float8_e4m3fn), ("int8", torch.int8)):
        codes, scales = _new(DECODING, HIDDEN, dtype=held), _new(DECODING, HIDDEN // 128)
        yield f"quantise {said} to {wire}", partial(rows.quantise, x, dtype=wire)
        yield (
            f"dequantise {wire} to {said}",
            partial(rows.dequantise, codes, scales, dtype=said),
        )
    yield f"swiglu, quantise {said}", lambda: _swiglu_quantise(both)
    yield f"quantise rows {said}", lambda: rows.quantise_rows(x)


def _swiglu_quantise(both: Tensor) -> None:
    tokens, n = both.shape[0], both.shape[1] // 2
    codes, scales = _new(tokens, n, dtype=torch.uint8), _new(tokens, n // 128)
    count, _ = tile(128)
    grid = (-(-tokens // count), n // 128)
    launch(row_kernels.swiglu_quantise, grid, both, codes, scales, tokens, n, E4M3=True, ROWS=count)


def decoding(queries: int, seqs: int, context: int) -> BatchMeta:
    """Return a batch whose every sequence adds ``queries`` tokens to reach ``context``."""
    blocks = -(-context // 128)
    positions = np.tile(np.arange(context - queries, context), seqs)
    tables = np.arange(seqs * blocks).reshape(seqs, blocks)
    slots = np.repeat(tables[:, -1] * 128, queries)
    starts = np.arange(seqs + 1) * queries
    arrays = (positions, slots, starts, np.full(seqs, context), tables)
    return BatchMeta(*(x.astype(np.int32) for x in arrays))


def _attention(arch: int, said: str, dtype: torch.dtype) -> Calls:
    formats = (said, "float8_e4m3fn", "int8") if dtype == torch.bfloat16 else (said,)
    heads = (HEAD_DIM, 128, 64) if dtype == torch.bfloat16 else (HEAD_DIM,)
    for held in formats:
        for head_dim in heads:
            name = f"{said}, KV {held}, head {head_dim}"
            yield f"decode {name}", partial(_attend, arch, dtype, held, head_dim, 1, FEW)
        name = f"{said}, KV {held}, head {HEAD_DIM}"
        yield f"prefill {name}", partial(_attend, arch, dtype, held, HEAD_DIM, PROMPT, 4)


def _attend(
    arch: int, dtype: torch.dtype, held: str, head_dim: int, queries: int, seqs: int
) -> None:
    spec = CacheSpec(1, head_dim, seqs * CONTEXT // 128, held)
    cache = attention.CudaCache(spec, META, arch)
    batch = attention.Batch(decoding(queries, seqs, CONTEXT), META)
    tokens = queries * seqs
    k = _new(tokens, 1, head_dim, dtype=dtype)
    if queries == 1:
        cache.write_turned(k, k, batch, theta=THETA)
    else:
        cache.write(k, k, batch)
    attention.attention(_new(tokens, HEADS, head_dim, dtype=dtype), cache, batch, scale=0.0625)


def stack(arch: int, dtype: torch.dtype, held: str) -> moe.ExpertWeights:
    """Return Step-3's experts of one layer without memory, as ``gemm_configuration`` names them."""
    shapes = {
        "gate": (EXPERTS, INTER, HIDDEN), "up": (EXPERTS, INTER, HIDDEN),
        "down": (EXPERTS, HIDDEN, INTER),
    }  # fmt: skip
    parts: dict[str, Any]
    if held == "plain":
        parts = {n: _new(*shape, dtype=dtype) for n, shape in shapes.items()}
    elif held == "int8":
        parts = {n: linear.Integers(shape, META) for n, shape in shapes.items()}
    else:
        parts = {
            n: linear.Codes(_new(*s, dtype=torch.uint8), _new(s[0], s[1] // 128, s[2] // 128))
            for n, s in shapes.items()
        }
    nbytes = sum(p.nbytes for p in parts.values())
    return moe.ExpertWeights(
        **parts, dtype=dtype, arch=arch, quantised=held == "e4m3 x e4m3",
        source={}, method=held, nbytes=nbytes,
    )  # fmt: skip


def _moe(arch: int, said: str, dtype: torch.dtype) -> Calls:
    logits = _new(DECODING, EXPERTS)
    if dtype == torch.float32:
        for renormalise in (False, True):
            yield (
                f"route, renormalise {renormalise}",
                partial(moe.route, logits, top_k=TOP_K, renormalise=renormalise),
            )
    formats = ["plain", "e4m3", "int8"]
    if arch >= FP8_ARCH and dtype == torch.bfloat16:
        formats.append("e4m3 x e4m3")
    for held in formats:
        for tokens in (DECODING, 512, 4096) if dtype == torch.bfloat16 else (DECODING,):
            yield (
                f"experts {said}, weights {held}, {tokens} tokens",
                partial(_experts, arch, dtype, held, tokens),
            )
    for held in ("e4m3", "int8"):
        yield f"linear {said}, weights {held}", partial(_linear, arch, dtype, held)


def _experts(arch: int, dtype: torch.dtype, held: str, tokens: int) -> None:
    ids = _new(tokens, TOP_K, dtype=torch.int32)
    share = _new(tokens, TOP_K, dtype=dtype)
    moe.experts(_new(tokens, HIDDEN, dtype=dtype), share, ids, stack(arch, dtype, held))


def _linear(arch: int, dtype: torch.dtype, held: str) -> None:
    part: linear.Codes | linear.Integers = linear.Integers((2560, HIDDEN), META)
    if held == "e4m3":
        part = linear.Codes(_new(2560, HIDDEN, dtype=torch.uint8), _new(20, HIDDEN // 128))
    weights = linear.LinearWeights(None, [part], None, dtype, arch, {}, held, part.nbytes)
    linear.linear(_new(DECODING, HIDDEN, dtype=dtype), weights)


def _vision(said: str, dtype: torch.dtype) -> Calls:
    width, heads = VISION_WIDTH, VISION_HEADS
    x = _new(VISION_TOKENS, width, dtype=dtype)
    weight = _new(width, dtype=dtype)
    q = _new(1, VISION_TOKENS, heads, width // heads, dtype=dtype)
    inner = _new(VISION_TOKENS, VISION_INTER, dtype=dtype)
    yield f"layer_norm {said}", lambda: norm.layer_norm(x, weight, weight, eps=1e-6)
    yield f"self_attention {said}", lambda: attention.self_attention(q, q, q, scale=112**-0.5)
    yield f"quick_gelu {said}", lambda: vision.quick_gelu(inner)
