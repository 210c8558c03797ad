"""``python -m bench.gpu``: the CUDA kernels on the card of this machine, against their bounds.

Written without a card and never run on one: on a machine without, it says so and ends.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

HEADS, HEAD_DIM, HIDDEN, INTER, EXPERTS, TOP_K = 64, 256, 7168, 5120, 48, 3
"""Step-3's sizes (arXiv 2507.19427 and the published configuration)."""

CONTEXT, BATCH = 8192, 64
"""Where decode is held against its bound: 80 % of what bandwidth and arithmetic allow."""

TOKENS = 128 * EXPERTS // TOP_K
"""128 tokens an expert: where the grouped product is held against the library's."""

TARGETS = {"decode": 0.8, "experts": 0.7}
"""Fractions of the bound that the kernels are meant to reach. Not known yet: see docs/cuda.md."""

COPIED_BYTES = 1 << 30
RUNS = 20

EPILOG = """\b
Examples:
  python -m bench.gpu --json gpu.json
  python -m bench.gpu --test
"""


@click.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--test", is_flag=True, help="Run conformance in full instead of timing.")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path),
              help="Write the figures here.")  # fmt: skip
def main(test: bool, path: Path | None) -> None:
    """Time MFA decode and the experts on this machine's card, or certify it."""
    from step3_hetero.registry import get_backend

    reason = get_backend("cuda").why_unavailable()
    if reason:
        click.echo(f"skipped: {reason}")
        return
    if test:
        sys.exit(_certify())
    figures = {**_machine(), "kernels": list(_measured())}
    for line in figures["kernels"]:
        took, share = f"{line['s'] * 1e6:.1f} µs", f"{line['fraction']:.1%} of bound"
        click.echo(f"{line['name']:<44} {took:>12} {share:>16}")
    if path is not None:
        path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _certify() -> int:
    """Run every case on the card; the certificate goes beside the others."""
    command = [sys.executable, "-m", "step3_hetero.cli", "conformance", "run", "--backend", "cuda",
               "--full", "--json", "docs/certificates/cuda.certificate.json"]  # fmt: skip
    return subprocess.run(command, check=False).returncode


def _machine() -> dict[str, Any]:
    import torch

    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "card": torch.cuda.get_device_name(),
        "torch": version("torch"),
        "triton": version("triton"),
    }


def _measured() -> Iterator[dict[str, Any]]:
    from step3_hetero.registry import get_backend

    device: Any = get_backend("cuda").open(0)
    bandwidth, peak = _bandwidth(), _peak()
    yield {"name": "copy bandwidth, bytes a second", "s": 0.0, "fraction": 1.0, "value": bandwidth}
    yield {"name": "bf16 GEMM, FLOP a second", "s": 0.0, "fraction": 1.0, "value": peak}
    yield from _decode(device, bandwidth, peak)
    yield from _experts(device, bandwidth, peak)


def _timed(work: Callable[[], Any]) -> float:
    """Return the median time of ``work`` in seconds by the card's own clock, after warming up."""
    import torch

    for _ in range(3):
        work()
    times = []
    for _ in range(RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return median(times)


def _bandwidth() -> float:
    """Return bytes read and written a second by a copy far larger than any cache."""
    import torch

    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / _timed(lambda: target.copy_(source))


def _peak() -> float:
    """Return the FLOP a second of a large square bf16 product by the library."""
    import torch

    n = 8192
    a, b = (torch.randn(n, n, device="cuda").bfloat16() for _ in range(2))
    return 2 * n**3 / _timed(lambda: a @ b)


def _line(name: str, seconds: float, bound_s: float, **more: Any) -> dict[str, Any]:
    return {"name": name, "s": seconds, "bound_s": bound_s, "fraction": bound_s / seconds, **more}


def _decode(device: Any, bandwidth: float, peak: float) -> Iterator[Mapping[str, Any]]:
    """MFA decode at 8K context and batch 64 against min(bandwidth, peak × intensity), and SDPA."""
    import torch
    import torch.nn.functional as F

    from step3_hetero.backend import BatchMeta
    from step3_hetero.specs import CacheSpec

    blocks = CONTEXT // 128
    tables = np.arange(BATCH * blocks).reshape(BATCH, blocks)
    arrays = (np.full(BATCH, CONTEXT - 1), tables[:, -1] * 128 + 127, np.arange(BATCH + 1),
              np.full(BATCH, CONTEXT), tables)  # fmt: skip
    batch = device.batch(BatchMeta(*(x.astype(np.int32) for x in arrays)))
    q = torch.randn(BATCH, HEADS, HEAD_DIM, device="cuda").bfloat16()
    flops = 4 * BATCH * HEADS * HEAD_DIM * CONTEXT
    for held in ("bfloat16", "float8_e4m3fn", "int8"):
        cache = device.open_cache(CacheSpec(1, HEAD_DIM, BATCH * blocks, held))
        bound = max(cache.nbytes / bandwidth, flops / peak)
        seconds = _timed(
            lambda c=cache: device.kernel("attention")(q, c, batch, scale=HEAD_DIM**-0.5)
        )
        yield _line(f"MFA decode, KV {held}", seconds, bound, target=TARGETS["decode"])
    k, v = (torch.randn(BATCH, 1, CONTEXT, HEAD_DIM, device="cuda").bfloat16() for _ in "kv")
    heads = q[:, None]  # query heads as rows of one head: the layout that suits SDPA
    seconds = _timed(lambda: F.scaled_dot_product_attention(heads, k, v))
    bound = max((k.nbytes + v.nbytes) / bandwidth, flops / peak)
    yield _line("torch SDPA on contiguous KV, heads as rows", seconds, bound)


def _experts(device: Any, bandwidth: float, peak: float) -> Iterator[Mapping[str, Any]]:
    """The experts of one layer at 128 tokens each against the same products by the library."""
    import torch

    from step3_hetero.backends.cuda.linear import Codes
    from step3_hetero.backends.cuda.moe import ExpertWeights

    shapes = {"gate": (EXPERTS, INTER, HIDDEN), "up": (EXPERTS, INTER, HIDDEN),
              "down": (EXPERTS, HIDDEN, INTER)}  # fmt: skip
    u = torch.randn(TOKENS, HIDDEN, device="cuda").bfloat16()
    ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(TOKENS)]).int().cuda()
    share = torch.full(ids.shape, 1 / TOP_K, dtype=torch.bfloat16, device="cuda")
    flops = 6 * TOKENS * TOP_K * HIDDEN * INTER
    for held in ("plain", "e4m3"):
        parts: dict[str, Any] = {}
        for name, shape in shapes.items():
            if held == "plain":
                parts[name] = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
            else:
                codes = torch.randint(0, 120, shape, device="cuda", dtype=torch.uint8)
                scale = torch.ones(shape[0], shape[1] // 128, shape[2] // 128, device="cuda")
                parts[name] = Codes(codes, scale)
        nbytes = sum(p.nbytes for p in parts.values())
        stack = ExpertWeights(**parts, dtype=torch.bfloat16, arch=device.arch, quantised=False,
                              source={}, method=held, nbytes=nbytes)  # fmt: skip
        bound = max(nbytes / bandwidth, flops / peak)
        seconds = _timed(lambda s=stack: device.kernel("experts")(u, share, ids, s))
        yield _line(f"experts, 128 tokens each, weights {held}", seconds, bound,
                    target=TARGETS["experts"])  # fmt: skip
        del parts, stack


if __name__ == "__main__":
    main()
