"""What attention costs beyond its projections: one small formula for each kind.

Every figure is for one decoded token in one layer. ``context`` counts the tokens attended to.
Source: arXiv 2507.19427, section 4, with the counts that reproduce its Table 6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

BF16_BYTES = 2.0
FP32_BYTES = 4.0


class AttentionCore(Protocol):
    """Arithmetic and KV bytes as functions of the context."""

    def flops(self, context: int) -> float:
        """Return the FLOPs of both products, queries by keys and weights by values."""
        ...

    def kv_bytes(self, context: int, element_bytes: float) -> float:
        """Return the bytes moved; ``element_bytes`` applies where the core does not fix it."""
        ...

    def held_bytes(self, context: int, element_bytes: float) -> float:
        """Return the bytes that one sequence holds in memory."""
        ...


@dataclass(frozen=True, slots=True)
class GroupedCore:
    """Grouped-query attention; one KV head is multi-query, and MFA.

    >>> GroupedCore(64, 1, 256).flops(1), GroupedCore(64, 1, 256).kv_bytes(1, 1.0)
    (65536.0, 512.0)
    """

    heads: int
    kv_heads: int
    head_dim: int
    element_bytes: float | None = None  # of a cache that is kept wider than the rest

    def flops(self, context: int) -> float:
        """Return two FLOPs for each of two products: heads · head_dim · 4 · context."""
        return float(self.heads * self.head_dim * 4 * context)

    def kv_bytes(self, context: int, element_bytes: float) -> float:
        """Return the keys and values of all KV heads."""
        return 2 * self.kv_heads * self.head_dim * context * (self.element_bytes or element_bytes)

    def held_bytes(self, context: int, element_bytes: float) -> float:
        """Return what is read: the whole cache."""
        return self.kv_bytes(context, element_bytes)


@dataclass(frozen=True, slots=True)
class LatentCore:
    """Multi-head latent attention: keys are the latent and the rotated part, values the latent.

    The paper counts the key's width for both products; ``value_dim`` says what is counted.

    >>> LatentCore(128, 576, 576).flops(1), LatentCore(128, 576, 512).kv_bytes(1, 1.0)
    (294912.0, 576.0)
    """

    heads: int
    key_dim: int
    value_dim: int

    def flops(self, context: int) -> float:
        """Return heads · (key_dim + value_dim) · 2 · context."""
        return float(self.heads * (self.key_dim + self.value_dim) * 2 * context)

    def kv_bytes(self, context: int, element_bytes: float) -> float:
        """Return the latent and the rotated key, which all heads share."""
        return self.key_dim * context * element_bytes

    def held_bytes(self, context: int, element_bytes: float) -> float:
        """Return what is read: the whole cache."""
        return self.kv_bytes(context, element_bytes)


@dataclass(frozen=True, slots=True)
class ChunkedCore:
    """Attention within a chunk: never more than ``chunk`` tokens.

    >>> full = GroupedCore(40, 8, 128)
    >>> ChunkedCore(full, 8192).flops(32768) == full.flops(8192)
    True
    """

    within: GroupedCore
    chunk: int

    def flops(self, context: int) -> float:
        """Return the FLOPs over the chunk."""
        return self.within.flops(min(context, self.chunk))

    def kv_bytes(self, context: int, element_bytes: float) -> float:
        """Return the chunk's keys and values."""
        return self.within.kv_bytes(min(context, self.chunk), element_bytes)

    def held_bytes(self, context: int, element_bytes: float) -> float:
        """Return the chunk's cache; earlier chunks are given up."""
        return self.kv_bytes(context, element_bytes)


@dataclass(frozen=True, slots=True)
class LightningCore:
    """Linear attention: a state of head_dim x head_dim a head in float32, whatever the context.

    >>> core = LightningCore(64, 128, 10)
    >>> core.kv_bytes(8192, 1.0) == 2 * core.held_bytes(8192, 1.0) == core.kv_bytes(1, 2.0)
    True
    """

    heads: int
    head_dim: int
    flops_per_element: float  # of the state; 10 is fitted to the paper's table

    def flops(self, context: int) -> float:
        """Return flops_per_element for each element of the state."""
        return self.flops_per_element * self.heads * self.head_dim**2

    def kv_bytes(self, context: int, element_bytes: float) -> float:
        """Return the state read and written."""
        return 2 * self.held_bytes(context, element_bytes)

    def held_bytes(self, context: int, element_bytes: float) -> float:
        """Return the state."""
        return self.heads * self.head_dim**2 * FP32_BYTES
