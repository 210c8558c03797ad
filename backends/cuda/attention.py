"""Attention over a paged cache. See ``reference.attention``.

Prompts and decoding run the same kernel. A tile is BLOCK_M (query, head) rows of one sequence under
one KV head: with 64 query heads on one KV head a decoding token fills it alone. Where tiles are
fewer than the card has processors, the keys are split too, and a second kernel combines.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
from torch import Tensor

from step3_hetero.backend import BatchMeta, KVCache
from step3_hetero.backends.cuda.checks import check_indices, check_width, longest_context
from step3_hetero.backends.cuda.configurations import Configuration, configuration
from step3_hetero.backends.cuda.kernels import attention as kernels
from step3_hetero.backends.cuda.kernels import numbers
from step3_hetero.backends.cuda.kernels import rope as rope_kernels
from step3_hetero.backends.cuda.launch import arch_of, launch, tile
from step3_hetero.backends.cuda.rope import angles
from step3_hetero.backends.cuda.rows import FORMAT, as_bytes
from step3_hetero.backends.torch_common.arrays import TORCH_DTYPE, to_host, to_torch
from step3_hetero.specs import LOGICAL_BLOCK, CacheSpec, HostArray

KEYS_OF_A_SPLIT = 512
"""A split reads at least so many keys: fewer do not pay for combining."""

PROCESSORS = {80: 108, 90: 132}
"""Streaming multiprocessors of an A800 and an H800: so many programs keep a card busy."""


class Batch:
    """A batch on the device, made once and shared by all layers."""

    def __init__(self, meta: BatchMeta, device: torch.device) -> None:
        self.meta = meta
        self.device = device
        arrays = (meta.positions, meta.slots, meta.query_starts, meta.block_tables)
        self.positions, self.slots, self.starts, self.tables = (self._placed(x) for x in arrays)
        self.padded = int(meta.query_starts[-1]) < meta.tokens
        self.longest = longest_context(meta)
        self._fits = False
        self._tiles: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._angles: dict[tuple[int, float, torch.dtype], tuple[Tensor, Tensor]] = {}

    def _placed(self, x: HostArray) -> Tensor:
        return to_torch(np.ascontiguousarray(x, np.int32)).to(self.device, copy=True)

    def check(self, cache: CudaCache) -> None:
        """Refuse a batch whose kernels would read behind its table, once for all layers.

        With the option ``check_indices``, also what the cache does not have.

        Raises:
            UnsupportedOp: naming the sequence, block or slot, and what is allowed.
        """
        if not self._fits:
            check_width(self.meta)
            self._fits = True
        if cache.checked:
            check_indices(self.meta, cache.spec.blocks)

    def tiles(self, group: int, block: int) -> tuple[Tensor, Tensor]:
        """Return each tile's sequence and first row: ``group`` rows a query, ``block`` a tile.

        Shapes: (tiles,) int32 twice.
        """
        key = (group, block)
        if key not in self._tiles:
            rows = np.diff(self.meta.query_starts) * group
            counts = -(-rows // block)
            seq = np.repeat(np.arange(len(rows)), counts)
            first = np.arange(len(seq)) - np.repeat(np.cumsum(counts) - counts, counts)
            self._tiles[key] = (self._placed(seq), self._placed(first * block))
        return self._tiles[key]

    def angles(self, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the rotary cosines and sines of the batch's positions."""
        key = (head_dim, theta, dtype)
        if key not in self._angles:
            self._angles[key] = angles(self.positions, head_dim, theta, dtype)
        return self._angles[key]


class CudaCache(KVCache):
    """Keys and values by slot, (slots, kv_heads, head_dim); FP8 and INT8 with a scale a row.

    Scales, (slots, kv_heads) float32, are one for each token and KV head.
    """

    def __init__(
        self, spec: CacheSpec, device: torch.device, arch: int, *, checked: bool = False
    ) -> None:
        self.spec = spec
        self.checked = checked
        self.device = device
        self.arch = arch
        self.format = FORMAT.get(spec.dtype, numbers.PLAIN.value)
        slots = spec.blocks * LOGICAL_BLOCK
        shape = (slots, spec.kv_heads, spec.head_dim)
        held = torch.uint8 if spec.dtype == "float8_e4m3fn" else TORCH_DTYPE[spec.dtype]
        self.k, self.v = (torch.zeros(shape, dtype=held, device=device) for _ in "kv")
        scaled = (slots, spec.kv_heads) if self.format != numbers.PLAIN.value else (1, 1)
        self.k_scale, self.v_scale = (torch.ones(scaled, device=device) for _ in "kv")
        self.nbytes = sum(x.nbytes for x in (self.k, self.v, self.k_scale, self.v_scale))

    def write(self, k: Tensor, v: Tensor, batch: Batch) -> None:
        """Store each row at its slot, quantised as the cache is."""
        self._write(k, v, batch, self.k_scale, self.k_scale, rotate=False)

    def write_turned(self, k: Tensor, v: Tensor, batch: Batch, *, theta: float) -> None:
        """Turn each key to its position, then store both: RoPE and write in one pass."""
        cos, sin = batch.angles(self.spec.head_dim, theta, k.dtype)
        self._write(k, v, batch, cos, sin, rotate=True)

    def _write(
        self, k: Tensor, v: Tensor, batch: Batch, cos: Tensor, sin: Tensor, *, rotate: bool
    ) -> None:
        head_dim = self.spec.head_dim
        if self.checked:
            check_indices(batch.meta, self.spec.blocks)
        k, v = (x if x.stride(1) == head_dim and x.stride(2) == 1 else x.contiguous()
                for x in (k, v))  # fmt: skip
        count, half = tile(head_dim // 2)
        rows = k.shape[0] * self.spec.kv_heads
        launch(
            rope_kernels.write_kv, (triton.cdiv(rows, count),), k, v, cos, sin, batch.slots,
            self.k, self.v, self.k_scale, self.v_scale, rows, self.spec.kv_heads, k.stride(0),
            v.stride(0), HEAD_DIM=head_dim, HALF=half, ROTATE=rotate, FORMAT=self.format,
            ROWS=count,
        )  # fmt: skip

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy one block after another, scales along with their rows."""
        for source, target in pairs:
            for stored in self._stored():
                blocked = stored.view(-1, LOGICAL_BLOCK, *stored.shape[1:])
                blocked[target] = blocked[source]

    def _stored(self) -> tuple[Tensor, ...]:
        plain = self.format == numbers.PLAIN.value
        return (self.k, self.v) if plain else (self.k, self.v, self.k_scale, self.v_scale)

    def read(self, blocks: Sequence[int]) -> tuple[HostArray, HostArray]:
        """Return copies of whole blocks; FP8 and INT8 as the float32 numbers they stand for."""
        chosen = torch.tensor(list(blocks), dtype=torch.long, device=self.device)
        return self._read(self.k, self.k_scale, chosen), self._read(self.v, self.v_scale, chosen)

    def _read(self, stored: Tensor, scale: Tensor, chosen: Tensor) -> HostArray:
        found = stored.view(-1, LOGICAL_BLOCK, *stored.shape[1:])[chosen]
        if self.format == numbers.PLAIN.value:
            return to_host(found.cpu().clone())
        codes = found.view(torch.float8_e4m3fn) if found.dtype == torch.uint8 else found
        scales = scale.view(-1, LOGICAL_BLOCK, scale.shape[1])[chosen]
        return to_host((codes.float() * scales[..., None]).cpu())


def attention(
    q: Tensor,
    cache: CudaCache,
    batch: Batch,
    *,
    scale: float,
    chosen: Configuration | None = None,
) -> Tensor:
    """See ``reference.attention.attention``. ``chosen`` stands in for the table's configuration."""
    tokens, heads, head_dim = q.shape
    batch.check(cache)
    if q.stride(2) != 1 or q.stride(1) != head_dim:
        q = q.contiguous()
    new = torch.zeros if batch.padded else torch.empty
    out = new((tokens, heads, head_dim), dtype=q.dtype, device=q.device)
    if batch.meta.seqs == 0:
        return out.zero_()
    chosen = chosen or attend_configuration(cache, q.dtype)
    seqs, first_rows = batch.tiles(heads // cache.spec.kv_heads, chosen.block("BLOCK_M"))
    splits = splits_of(len(seqs) * cache.spec.kv_heads, batch.longest, cache.arch)
    partial, lse = out, out
    if splits > 1:
        partial = torch.empty((splits, *out.shape), dtype=torch.float32, device=q.device)
        lse = torch.full((splits, tokens, heads), -torch.inf, device=q.device)
    _attend(q, cache, batch, (out, partial, lse), (seqs, first_rows), splits, scale, chosen)
    if splits > 1:
        _combine(partial, lse, out)
    return out


def attend_configuration(cache: CudaCache, dtype: torch.dtype) -> Configuration:
    """Return the tile for a cache's format and head."""
    held = {"float8_e4m3fn": "e4m3", "int8": "int8"}.get(cache.spec.dtype, cache.spec.dtype)
    said = "float32" if dtype == torch.float32 else held
    return configuration("attend", arch=cache.arch, numbers=said, size=cache.spec.head_dim)


def splits_of(programs: int, longest: int, arch: int) -> int:
    """Return into how many parts the keys are split so that ``programs`` fill a card.

    >>> splits_of(programs=1, longest=8192, arch=90), splits_of(64, 8192, 90)
    (16, 2)
    """
    card = PROCESSORS[max(known for known in PROCESSORS if known <= arch)]
    return max(1, min(card // programs, -(-longest // KEYS_OF_A_SPLIT)))


def _attend(
    q: Tensor,
    cache: CudaCache,
    batch: Batch,
    results: tuple[Tensor, Tensor, Tensor],
    tiles: tuple[Tensor, Tensor],
    splits: int,
    scale: float,
    chosen: Configuration,
) -> None:
    tokens, heads, head_dim = q.shape
    kv_heads = cache.spec.kv_heads
    launch(
        kernels.attend, (len(tiles[0]), kv_heads, splits), q, as_bytes(cache.k), as_bytes(cache.v),
        cache.k_scale, cache.v_scale, *results, batch.tables, *tiles, batch.starts,
        batch.positions, tokens, kv_heads, splits, q.stride(0), batch.tables.stride(0), scale,
        configuration=chosen, GROUP=heads // kv_heads, HEAD_DIM=head_dim,
        WIDTH=max(16, triton.next_power_of_2(head_dim)), FORMAT=cache.format, SPLIT=splits > 1,
    )  # fmt: skip


def _combine(partial: Tensor, lse: Tensor, out: Tensor) -> None:
    splits, tokens, heads, head_dim = partial.shape
    count, width = tile(head_dim)
    rows = tokens * heads
    launch(
        kernels.combine, (triton.cdiv(rows, count),), partial, lse, out, rows, splits,
        HEAD_DIM=head_dim, WIDTH=width, ROWS=count,
    )  # fmt: skip


def self_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """See ``reference.attention.self_attention``."""
    images, tokens, heads, head_dim = q.shape
    if len({x.stride() for x in (q, k, v)}) > 1 or q.stride()[2:] != (head_dim, 1):
        q, k, v = (x.contiguous() for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    said = str(q.dtype).removeprefix("torch.")
    chosen = configuration("attend_image", arch=arch_of(q), numbers=said, size=head_dim)
    grid = (triton.cdiv(tokens, chosen.block("BLOCK_M")), images * heads)
    launch(
        kernels.attend_image, grid, q, k, v, out, tokens, heads, q.stride(0), q.stride(1), scale,
        configuration=chosen, HEAD_DIM=head_dim, WIDTH=max(16, triton.next_power_of_2(head_dim)),
    )  # fmt: skip
    return out
