"""``python -m bench.gpu_roofline``: what each CUDA kernel moves and multiplies, against the least.

Counted in Triton's interpreter, access by access, at small sizes of Step-3's proportions: extra
traffic shows without a card. Writes docs/cuda-roofline.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from bench.command import BenchCommand

DOC = Path(__file__).parents[1] / "docs" / "cuda-roofline.md"

HEADS, HEAD_DIM, KEYS, SEQS = 64, 256, 1024, 2
HIDDEN, INTER, EXPERTS, TOP_K, TOKENS = 256, 384, 8, 2, 32
PROMPT = 16

EPILOG = """\b
Examples:
  python -m bench.gpu_roofline
  python -m bench.gpu_roofline --write
"""

HEAD = """# The CUDA kernels' traffic, counted

Made by `python -m bench.gpu_roofline --write`: each kernel in Triton's interpreter, every access of
every program counted. No card took part.

- *bytes, at least*: each address that is read or written, once.
- *asked for*: all loads and stores as a part of that. What lies above 1 is read again by another
  program and has to come out of a cache.
- *FLOP, at least*: those of the op's definition; *done*: those of the tiles, padding included.
- *intensity*: FLOP at least per byte at least. Where a card's balance (arithmetic by bandwidth, in
  bf16: H800 295, H20 37, A800 156 FLOP per byte) is above it, memory binds.

| kernel | bytes, at least | asked for | FLOP, at least | done | intensity |
|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Line:
    """One kernel's figures: bytes and FLOP, each the least there can be and what was done."""

    name: str
    least_bytes: int
    asked_bytes: int
    least_flops: int
    done_flops: int

    def __str__(self) -> str:
        flops, done, intensity = "–", "–", "–"
        if self.least_flops:
            flops = f"{self.least_flops:,}"
            done = f"{self.done_flops / self.least_flops:.2f}"
            intensity = f"{self.least_flops / self.least_bytes:.1f}"
        asked = f"{self.asked_bytes / self.least_bytes:.2f}"
        return f"| {self.name} | {self.least_bytes:,} | {asked} | {flops} | {done} | {intensity} |"


def lines() -> Iterator[Line]:
    """Count every job."""
    import torch

    torch.manual_seed(0)
    from step3_hetero.registry import get_backend

    device: Any = get_backend("cuda").open(0, {"interpret": True})
    for name, least_flops, call in (
        *_attention(device),
        *_experts(device),
        *_linear(device),
        *_rows(device),
    ):
        yield count(name, least_flops, call)


def count(name: str, least_flops: int, call: Callable[[], Any]) -> Line:
    """Run one job and count its kernels; what torch itself copies is not seen."""
    from step3_hetero.backends.cuda.interpreter import counting

    with counting() as traffic:
        call()
    return Line(name, traffic.least_bytes, traffic.asked_bytes, least_flops, traffic.flops)


def _attention(device: Any) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    import torch

    from step3_hetero.specs import CacheSpec

    shape = f"{HEADS} heads on 1, head_dim {HEAD_DIM}, {KEYS} keys"
    for held in ("bfloat16", "float8_e4m3fn", "int8"):
        cache = device.open_cache(CacheSpec(1, HEAD_DIM, SEQS * KEYS // 128, held))
        batch = device.batch(_meta(1, SEQS))
        q = torch.randn(SEQS, HEADS, HEAD_DIM).bfloat16()
        flops = 4 * SEQS * HEADS * HEAD_DIM * KEYS
        yield (
            f"decode, {SEQS} sequences, {shape}, KV {held}", flops,
            partial(device.kernel("attention"), q, cache, batch, scale=0.0625),
        )  # fmt: skip
        k = torch.randn(SEQS, 1, HEAD_DIM).bfloat16()
        yield (
            f"RoPE and KV write, {SEQS} tokens, KV {held}", 0,
            partial(cache.write_turned, k, k, batch, theta=5e5),
        )  # fmt: skip
    cache = device.open_cache(CacheSpec(1, HEAD_DIM, KEYS // 128, "bfloat16"))
    batch = device.batch(_meta(PROMPT, 1))
    q = torch.randn(PROMPT, HEADS, HEAD_DIM).bfloat16()
    seen = sum(range(KEYS - PROMPT + 1, KEYS + 1))
    yield (
        f"prefill, a chunk of {PROMPT} tokens, {shape}", 4 * HEADS * HEAD_DIM * seen,
        partial(device.kernel("attention"), q, cache, batch, scale=0.0625),
    )  # fmt: skip


def _meta(queries: int, seqs: int) -> Any:
    from step3_hetero.backend import BatchMeta

    blocks = KEYS // 128
    positions = np.tile(np.arange(KEYS - queries, KEYS), seqs)
    tables = np.arange(seqs * blocks).reshape(seqs, blocks)
    slots = (tables[:, -1:] * 128 + 128 - queries + np.arange(queries)).ravel()
    arrays = (positions, slots, np.arange(seqs + 1) * queries, np.full(seqs, KEYS), tables)
    return BatchMeta(*(x.astype(np.int32) for x in arrays))


def _experts(device: Any) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    import torch

    from step3_hetero.specs import OpSpec

    shapes = {"gate": (EXPERTS, INTER, HIDDEN), "up": (EXPERTS, INTER, HIDDEN),
              "down": (EXPERTS, HIDDEN, INTER)}  # fmt: skip
    rng = np.random.default_rng(0)
    u = torch.randn(TOKENS, HIDDEN).bfloat16()
    ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(TOKENS)]).int()
    share = torch.full(ids.shape, 0.5, dtype=torch.bfloat16)
    flops = 6 * TOKENS * TOP_K * HIDDEN * INTER
    for stored, held in (("bfloat16", "auto"), ("float8_e4m3fn", "auto"), ("bfloat16", "int8")):
        tensors = {n: _weight(rng, n, s, stored) for n, s in shapes.items()}
        spec = OpSpec("experts", "bfloat16", weight_format=held)
        weights = device.prepare("experts", tensors, spec)
        said = stored if held == "auto" else held
        yield (
            f"experts, {TOKENS} tokens, top {TOP_K} of {EXPERTS}, {HIDDEN}×{INTER}, {said}",
            flops,
            partial(device.kernel("experts"), u, share, ids, weights),
        )


def _linear(device: Any) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    import torch

    from step3_hetero.specs import OpSpec

    rng = np.random.default_rng(0)
    x = torch.randn(TOKENS, HIDDEN).bfloat16()
    for stored, held in (("float8_e4m3fn", "auto"), ("bfloat16", "int8")):
        tensors = {"w": _weight(rng, "w", (INTER, HIDDEN), stored)}
        weights = device.prepare(
            "linear", tensors, OpSpec("linear", "bfloat16", weight_format=held)
        )
        said = stored if held == "auto" else held
        yield (
            f"linear, {TOKENS} tokens, {HIDDEN}×{INTER}, {said}", 2 * TOKENS * HIDDEN * INTER,
            partial(device.kernel("linear"), x, weights),
        )  # fmt: skip


def _weight(rng: np.random.Generator, name: str, shape: tuple[int, ...], stored: str) -> Any:
    from step3_hetero.specs import HostTensor

    data = rng.standard_normal(shape).astype(stored)
    scale = np.ones((*shape[:-2], shape[-2] // 128, shape[-1] // 128), np.float32)
    return HostTensor(name, data, scale if stored == "float8_e4m3fn" else None)


def _rows(device: Any) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    import torch

    from step3_hetero.backends.cuda.norm import add_rms_norm
    from step3_hetero.backends.cuda.rows import quantise_rows

    x = torch.randn(TOKENS, 1024).bfloat16()
    weight = torch.ones(1024).bfloat16()
    logits = torch.randn(TOKENS, 48)
    shape = f"{TOKENS}×1024"
    yield f"rms_norm {shape}", 0, lambda: device.kernel("rms_norm")(x, weight, eps=1e-5)
    yield f"add and rms_norm {shape}", 0, lambda: add_rms_norm(x, x.clone(), weight, eps=1e-5)
    yield f"swiglu {shape}", 0, lambda: device.kernel("swiglu")(x)
    yield (
        f"quantise to e4m3 {shape}", 0,
        lambda: device.kernel("quantise")(x, dtype="float8_e4m3fn"),
    )  # fmt: skip
    yield f"quantise rows to int8 {shape}", 0, lambda: quantise_rows(x)
    yield (
        f"route {TOKENS}×48", 0,
        lambda: device.kernel("route")(logits, top_k=3, renormalise=False),
    )  # fmt: skip


@click.command(
    cls=BenchCommand, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.option("--write", is_flag=True, help="Write docs/cuda-roofline.md as well.")
def main(write: bool) -> None:
    """Count bytes and FLOP of every kernel in Triton's interpreter."""
    text = HEAD
    for line in lines():
        click.echo(str(line))
        text += f"{line}\n"
    if write:
        DOC.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
