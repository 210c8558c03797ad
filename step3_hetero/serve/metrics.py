"""An engine's state as Prometheus metrics, read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from step3_hetero.errors import RequestError
from step3_hetero.runtime.clocks import PER_OCTAVE, Durations
from step3_hetero.runtime.paces import Paces, role_of
from step3_hetero.runtime.stats import EngineStats

if TYPE_CHECKING:
    from step3_hetero.runtime.engine import Engine

PREFIX = "step3_hetero"


GAUGES = {
    "running": ("num_requests_running", "Requests in a lane."),
    "waiting": ("num_requests_waiting", "Requests that wait for a lane."),
    "blocks": ("kv_blocks", "Logical KV blocks of all attention instances."),
    "free_blocks": ("kv_blocks_free", "KV blocks that hold nothing."),
    "cached_blocks": ("kv_blocks_cached", "KV blocks that nobody holds, kept for what they hold."),
}
"""Counts of `EngineStats` that stand now: name of the metric and what it says, by field."""

COUNTERS = {
    "preemptions": ("preemptions", "Requests that gave way and are computed again."),
    "prefix_tokens_reused": ("prefix_tokens_reused", "Tokens whose keys were found in the cache."),
    "losses": ("cache_losses", "Times that an attention instance was lost with its cache."),
}
"""Counts of `EngineStats` since the start."""


class EngineCollector:
    """Yields the metric families of one engine: queues, KV cache, seconds and bytes by stage."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Any]:
        """Yield what stands now; called from the thread of the HTTP server."""
        from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

        yield from stats_families(self._engine.stats())
        executor = self._engine.executor
        labels = ("role", "stage")
        seconds = HistogramMetricFamily(
            f"{PREFIX}_stage_seconds", "Seconds of stages, edges and waits.", labels=labels
        )
        sent = CounterMetricFamily(f"{PREFIX}_edge_bytes", "Bytes sent on edges.", labels=labels)
        for key, durations in list(executor.clock.entries.items()):
            seconds.add_metric(key, buckets(durations), durations.seconds)
            if durations.sent_bytes:
                sent.add_metric(key, durations.sent_bytes)
        yield seconds
        yield sent
        if executor.paces is not None:
            yield from pace_families(executor.paces)


def stats_families(stats: EngineStats) -> Iterator[Any]:
    """Yield every count of an engine, and the part of its KV blocks that is held."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    for field, (name, text) in GAUGES.items():
        yield GaugeMetricFamily(f"{PREFIX}_{name}", text, getattr(stats, field))
    for field, (name, text) in COUNTERS.items():
        yield CounterMetricFamily(f"{PREFIX}_{name}", text, getattr(stats, field))
    held = 1 - (stats.free_blocks + stats.cached_blocks) / stats.blocks
    yield GaugeMetricFamily(f"{PREFIX}_kv_cache_usage_ratio", "KV blocks held, of all.", held)


def pace_families(paces: Paces) -> Iterator[Any]:
    """Yield how long each member's calls take, and how many times what its peers' do."""
    from prometheus_client.core import GaugeMetricFamily

    labels = ("role", "member", "stage")
    seconds = GaugeMetricFamily(
        f"{PREFIX}_member_seconds", "Seconds of a member's calls.", labels=(*labels, "stat")
    )
    ratio = GaugeMetricFamily(
        f"{PREFIX}_member_slowness_ratio",
        "Median of a member's calls to that of its peers, or of its first minutes if it is alone.",
        labels=labels,
    )
    for pace in paces.rows():
        key = (role_of(pace.member), pace.member, pace.stage)
        for stat, value in (("mean", pace.mean_s), ("p50", pace.p50_s), ("p95", pace.p95_s)):
            seconds.add_metric((*key, stat), value)
        if pace.ratio is not None:
            ratio.add_metric(key, pace.ratio)
    yield seconds
    yield ratio


def buckets(durations: Durations) -> list[tuple[str, float]]:
    """Return cumulative counts by powers of two of a second, the last one open."""
    by_octave: dict[int, int] = {}
    for step, count in list(durations.filed.items()):
        octave = step // PER_OCTAVE + 1
        by_octave[octave] = by_octave.get(octave, 0) + count
    edges = sorted(by_octave)
    counts = accumulate(by_octave[edge] for edge in edges)
    found = [(str(2.0**edge), float(n)) for edge, n in zip(edges, counts, strict=True)]
    return [*found, ("+Inf", float(durations.calls))]


def require_client() -> None:
    """Refuse metrics that could not be served, before anything is loaded for them.

    Raises:
        RequestError: prometheus_client is not installed.
    """
    try:
        import prometheus_client  # noqa: F401  asked for, used later
    except ImportError:
        raise RequestError(
            "--metrics-port needs prometheus_client: pip install 'step3-hetero[serve]'"
        ) from None


@contextmanager
def serve_metrics(engine: Engine, port: int) -> Iterator[int]:
    """Serve an engine's metrics on loopback while the context is open; yield the port.

    Raises:
        RequestError: the port is taken, or prometheus_client is not installed.
    """
    require_client()
    from prometheus_client import CollectorRegistry, start_http_server

    registry = CollectorRegistry()
    registry.register(EngineCollector(engine))
    try:
        server, thread = start_http_server(port, addr="127.0.0.1", registry=registry)
    except OSError as cause:
        raise RequestError(f"--metrics-port {port}: {cause.strerror}; take another one") from cause
    try:
        yield int(server.server_port)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
