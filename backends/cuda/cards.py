"""What the backend knows of cards without one: for checks and plans on a laptop."""

from __future__ import annotations

from dataclasses import dataclass

from step3_hetero.backend import DeviceInfo, Dtypes
from step3_hetero.errors import PlacementError

COMPUTED = ("float32", "bfloat16")
WIRE = ("float32", "bfloat16", "float8_e4m3fn", "int8")
STORED = (*COMPUTED, "float8_e4m3fn", "int8")

OLDEST_ARCH = 80
"""The oldest compute capability that the kernels are compiled for: bfloat16 tensor cores."""

FP8_ARCH = 89
"""The first compute capability with FP8 arithmetic: 8.9."""


@dataclass(frozen=True)
class Card:
    """One product: compute capability (90 for 9.0), memory, and what Triton may use of it.

    ``shared_bytes`` is what one block of threads may have of shared memory (CUDA C++ Programming
    Guide, table of technical specifications by compute capability).
    """

    title: str
    arch: int
    memory_bytes: int
    bandwidth_bytes_per_s: float
    bf16_flops_per_s: float
    fp8_flops_per_s: float | None


SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Shared memory of one block of threads at most, by compute capability (CUDA C++ Programming
Guide, technical specifications per compute capability)."""

GB = 10**9

CARDS = {
    "h800": Card("NVIDIA H800 SXM", 90, 80 * GB, 3350e9, 989e12, 1979e12),
    "h100": Card("NVIDIA H100 SXM", 90, 80 * GB, 3350e9, 989e12, 1979e12),
    "h200": Card("NVIDIA H200", 90, 141 * GB, 4800e9, 989e12, 1979e12),
    "h20": Card("NVIDIA H20", 90, 96 * GB, 4000e9, 148e12, 296e12),
    "a800": Card("NVIDIA A800 SXM", 80, 80 * GB, 2000e9, 312e12, None),
    "a100": Card("NVIDIA A100 SXM 80 GB", 80, 80 * GB, 2039e9, 312e12, None),
}
"""The figures of placement/devices.yaml; tests/cuda/test_backend.py holds the two together."""


def describe(name: str) -> DeviceInfo:
    """Describe a card that need not be here.

    Raises:
        PlacementError: the backend does not know it.
    """
    if name not in CARDS:
        raise PlacementError(f"backend cuda has no card {name!r}; it knows {', '.join(CARDS)}")
    card = CARDS[name]
    flops = {"bfloat16": card.bf16_flops_per_s}
    if card.fp8_flops_per_s is not None:
        flops["float8_e4m3fn"] = card.fp8_flops_per_s
    return DeviceInfo(
        "cuda:0",
        described(card.title, card.arch),
        card.memory_bytes,
        Dtypes(STORED, computed(card.arch), WIRE),
        bandwidth_bytes_per_s=card.bandwidth_bytes_per_s,
        flops_per_s=flops,
    )


def described(title: str, arch: int) -> str:
    """Return a card in words: FP8 arithmetic or none is what tells them apart."""
    fp8 = "FP8 arithmetic" if arch >= FP8_ARCH else "no FP8 arithmetic: FP8 weights become bf16"
    return f"{title}, compute capability {arch // 10}.{arch % 10}, {fp8}"


def computed(arch: int) -> tuple[str, ...]:
    """Return the dtypes in which a card multiplies."""
    return (*COMPUTED, "float8_e4m3fn") if arch >= FP8_ARCH else COMPUTED
