"""Router, the order in which experts take their tokens, and the weighted sum of what they give."""

import triton
import triton.language as tl


@triton.jit
def route(
    logits, weights, ids, tokens, experts,
    TOP_K: tl.constexpr, RENORMALISE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Softmax over all experts, then the TOP_K largest, falling; of equal ones the lower first.

    Shapes: logits (tokens, experts) float32, weights (tokens, TOP_K) float32, ids int32. WIDTH is
    ``experts`` or the power of two above.
    """
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    number = tl.arange(0, WIDTH)[None, :]
    there = (token < tokens)[:, None] & (number < experts)
    at = token[:, None] * experts + number
    row = tl.load(logits + at, mask=there, other=-float("inf"))
    row = tl.where((token < tokens)[:, None], row, 0.0)
    shifted = tl.exp(row - tl.max(row, 1)[:, None])
    p = tl.div_rn(shifted, tl.broadcast_to(tl.sum(shifted, 1)[:, None], shifted.shape))
    left = tl.where(number < experts, p, -2.0)
    chosen = tl.zeros([ROWS], tl.float32)
    for _ in tl.static_range(TOP_K):
        best = tl.argmax(left, 1)
        chosen += tl.max(left, 1)
        left = tl.where(number == best[:, None], -1.0, left)
    left = tl.where(number < experts, p, -2.0)
    for place in tl.static_range(TOP_K):
        best = tl.argmax(left, 1)
        weight = tl.max(left, 1)
        if RENORMALISE:
            weight = tl.div_rn(weight, chosen)
        tl.store(ids + token * TOP_K + place, best.to(tl.int32), mask=token < tokens)
        tl.store(weights + token * TOP_K + place, weight, mask=token < tokens)
        left = tl.where(number == best[:, None], -1.0, left)


@triton.jit
def count_slots(ids, counts, slots, BLOCK: tl.constexpr):
    """Count one expert's slots. Shapes: ids (slots,), counts (experts,), int32."""
    expert = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.int32)
    for first in tl.range(0, slots, BLOCK):
        place = first + tl.arange(0, BLOCK)
        found = tl.load(ids + place, mask=place < slots, other=-1)
        total += (found == expert).to(tl.int32)
    tl.store(counts + expert, tl.sum(total, 0))


@triton.jit
def place_slots(
    ids, counts, rows, tile_expert, slots, experts,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """List one expert's slots in their order, from a tile of its own on.

    Shapes: ids (slots,), counts (experts,); rows (tiles · BLOCK_M,) and tile_expert (tiles,), both
    -1 where nothing is written; int32. No atomics: two runs give the same order.
    """
    expert = tl.program_id(0)
    number = tl.arange(0, WIDTH)
    count = tl.load(counts + number, mask=number < experts, other=0)
    first_tile = tl.sum(tl.where(number < expert, tl.cdiv(count, BLOCK_M), 0), 0)
    tiles = tl.cdiv(tl.load(counts + expert), BLOCK_M)
    for tile in tl.range(0, tiles):
        tl.store(tile_expert + first_tile + tile, expert)
    placed = first_tile * BLOCK_M
    for first in tl.range(0, slots, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        mine = tl.load(ids + slot, mask=slot < slots, other=-1) == expert
        rank = tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(rows + placed + rank, slot, mask=mine)
        placed += tl.sum(mine.to(tl.int32), 0)


@triton.jit
def mix(
    chosen, weights, ids, out, tokens, n,
    TOP_K: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Add up a token's experts, each times its weight, in the order of ids; id -1 adds nothing.

    Shapes: chosen (tokens · TOP_K, n), weights, ids (tokens, TOP_K), out (tokens, n). Sums in
    float32, rounded once.
    """
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = (token < tokens) & (column < n)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for place in tl.static_range(TOP_K):
        slot = token * TOP_K + place
        there = inside & (tl.load(ids + slot, mask=token < tokens, other=-1) >= 0)
        row = tl.load(chosen + slot * n + column, mask=there, other=0.0).to(tl.float32)
        total += row * tl.load(weights + slot, mask=token < tokens, other=0.0).to(tl.float32)
    tl.store(out + token * n + column, total.to(out.dtype.element_ty), mask=inside)
