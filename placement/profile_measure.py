"""Measuring a device through its contract: products, attention, copies, the choice of tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import numpy as np

from step3_hetero.backend import Array, BatchMeta, Device
from step3_hetero.placement.profile_file import Profile
from step3_hetero.specs import LOGICAL_BLOCK, CacheSpec, HostTensor, OpSpec

ROWS = (1, 4, 16, 64)
CONTEXTS = (128, 512, 2048)
STAGE_ROWS = (1, 2, 4, 8, 16, 32)
WIDTH = 2048
"""Of the square matrix that is multiplied: 8 MB in bfloat16, more than a core's cache."""

SMALL = 16
HEADS, HEAD_DIM = 16, 128

RUNS = 7
"""Of each measurement, after one that does not count; the median stands."""

LEAST_S = 0.002
"""Runs shorter than this are repeated until they take as long."""

ROUNDS_S = 0.2
"""Rounds of actions in turn are repeated for as long: a machine's pace drifts within less."""

SEED = 0x57E3


class Clock:
    """Times actions; replaced in tests."""

    def seconds(self, action: Callable[[], Any]) -> float:
        """Return the median seconds of one call."""
        started = time.perf_counter()
        action()
        once = max(time.perf_counter() - started, 1e-7)
        times = max(1, int(LEAST_S / once))
        return median(self._run(action, times) for _ in range(RUNS))

    def in_turn(self, actions: Sequence[Callable[[], Any]]) -> list[float]:
        """Return the mean seconds of each action, all run one after another, round after round.

        That is how an engine runs the stages of a model: none finds its weights in a cache that it
        has just filled itself. A step is a round: its time is a sum, which medians of single
        actions do not add up to, so the means of the middle half of the rounds stand.
        """
        rounds: list[list[float]] = []
        started = time.perf_counter()
        while len(rounds) <= RUNS or time.perf_counter() - started < ROUNDS_S:
            rounds.append([self._run(action, 1) for action in actions])
        by_total = sorted(rounds[1:], key=sum)
        quarter = len(by_total) // 4
        middle = by_total[quarter : len(by_total) - quarter]
        return [mean(times) for times in zip(*middle, strict=True)]

    @staticmethod
    def _run(action: Callable[[], Any], times: int) -> float:
        started = time.perf_counter()
        for _ in range(times):
            action()
        return (time.perf_counter() - started) / times


@dataclass(frozen=True, slots=True)
class Bench:
    """A device, the dtype it computes in, and what times it."""

    device: Device
    dtype: str
    clock: Clock

    def array(self, *shape: int) -> Array:
        """Return random values on the device."""
        values = np.random.default_rng(SEED).standard_normal(shape, np.float32)
        return self.device.from_host(values, self.dtype)

    def timed(self, action: Callable[[], Array]) -> float:
        """Return the seconds of an action, its result awaited by a copy of one element."""

        def awaited() -> None:
            self.device.to_host(action()[:1])

        return self.clock.seconds(awaited)


def measure(bench: Bench, backend: str, card: str | None) -> Profile:
    """Measure products and attention; the rest of the profile is empty."""
    info = bench.device.info
    linear = list(_linears(bench))
    one, most, tiny = linear[0], linear[len(ROWS) - 1], linear[-1]
    element_bytes = 2 if bench.dtype == "bfloat16" else 4
    return Profile(
        backend=backend,
        device={
            "name": info.name,
            "description": info.description,
            "memory_bytes": info.memory_bytes,
            "card": card,
        },
        dtype=bench.dtype,
        bandwidth_bytes_per_s=WIDTH * WIDTH * element_bytes / one["seconds"],
        flops_per_s=2 * most["rows"] * WIDTH * WIDTH / most["seconds"],
        call_s=tiny["seconds"],
        linear=linear,
        attention=list(_attentions(bench)),
    )


def _linears(bench: Bench) -> Iterator[dict[str, Any]]:
    """Yield the square product at several numbers of rows, and the smallest one last."""
    for rows, width in [*((rows, WIDTH) for rows in ROWS), (1, SMALL)]:
        values = np.random.default_rng(SEED).standard_normal((width, width), np.float32)
        weight = HostTensor("weight", values)
        spec = OpSpec("linear", bench.dtype, {}, {"out_dtype": bench.dtype})
        held = bench.device.prepare("linear", {"weight": weight}, spec)
        kernel, x = bench.device.kernel("linear"), bench.array(rows, width)
        seconds = bench.timed(lambda k=kernel, x=x, w=held: k(x, w))  # type: ignore[misc]
        yield {"rows": rows, "inner": width, "columns": width, "seconds": seconds}


def _attentions(bench: Bench) -> Iterator[dict[str, Any]]:
    """Yield decoding of 8 sequences with one KV head at several contexts."""
    rows = 8
    for context in CONTEXTS:
        meta = decode_meta(rows, context)
        blocks = rows * -(-context // LOGICAL_BLOCK)
        cache = bench.device.open_cache(CacheSpec(1, HEAD_DIM, blocks, bench.dtype))
        batch = bench.device.batch(meta)
        kernel, q = bench.device.kernel("attention"), bench.array(rows, HEADS, HEAD_DIM)
        seconds = bench.timed(
            lambda k=kernel, q=q, c=cache, b=batch: k(q, c, b, scale=HEAD_DIM**-0.5)  # type: ignore[misc]
        )
        yield {
            "rows": rows, "context": context, "heads": HEADS, "kv_heads": 1,
            "head_dim": HEAD_DIM, "seconds": seconds,
        }  # fmt: skip


def decode_meta(rows: int, context: int) -> BatchMeta:
    """Return one new token of each of ``rows`` sequences, ``context`` tokens long with it."""
    blocks = -(-context // LOGICAL_BLOCK)
    tables = np.arange(rows * blocks, dtype=np.int32).reshape(rows, blocks)
    last = context - 1
    slots = tables[:, last // LOGICAL_BLOCK] * LOGICAL_BLOCK + last % LOGICAL_BLOCK
    return BatchMeta(
        positions=np.full(rows, last, np.int32),
        slots=slots.astype(np.int32),
        query_starts=np.arange(rows + 1, dtype=np.int32),
        context_lens=np.full(rows, context, np.int32),
        block_tables=tables,
    )


def measure_crossing(
    bench: Bench, hidden: int, rows: Sequence[int] = STAGE_ROWS
) -> list[dict[str, Any]]:
    """Measure an activation's way to the host and back."""

    def once(x: Array) -> Callable[[], Any]:
        return lambda: bench.device.from_host(bench.device.to_host(x))

    return [
        {
            "rows": n, "columns": hidden,
            "seconds": bench.clock.seconds(once(bench.array(n, hidden))),
        }
        for n in rows
    ]  # fmt: skip


def measure_choosing(
    bench: Bench, vocab: int, rows: Sequence[int] = STAGE_ROWS
) -> list[dict[str, Any]]:
    """Measure how a token is chosen from each row of logits, greedily, its numbers copied in."""
    device, found = bench.device, []
    for count in rows:
        values = np.random.default_rng(SEED).standard_normal((count, vocab), np.float32)
        logits = device.from_host(values)
        host = (
            np.arange(count, dtype=np.int32),
            np.zeros(count),
            np.zeros(count, np.int32),
            np.ones(count),
            np.full(count, 0.5),
        )

        def choose(logits: Array = logits, host: tuple[Any, ...] = host) -> None:
            _, *draws = [device.from_host(values) for values in host]
            device.to_host(device.kernel("sample")(logits, *draws, banned=-1))

        found.append({"rows": count, "seconds": bench.clock.seconds(choose)})
    return found
