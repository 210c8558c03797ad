"""An engine's state as Prometheus metrics, read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from step3_hetero.errors import RequestError
from step3_hetero.runtime.clocks import PER_OCTAVE, Durations
from step3_hetero.runtime.paces import Paces, role_of

if TYPE_CHECKING:
    from step3_hetero.runtime.engine import Engine

PREFIX = "step3_hetero"


class EngineCollector:
    """Yields the metric families of one engine: queues, KV cache, seconds and bytes by stage."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Any]:
        """Yield what stands now; called from the thread of the HTTP server."""
        from prometheus_client.core import (
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
        )

        lanes, executor = self._engine.lanes, self._engine.executor
        running = sum(len(lane.scheduler.running) for lane in lanes.lanes)
        blocks = executor.kv_blocks * executor.instances
        for name, text, value in (
            ("num_requests_running", "Requests in a lane.", running),
            ("num_requests_waiting", "Requests that wait for a lane.", len(lanes.waiting)),
            ("kv_cache_usage_ratio", "KV blocks held, of all.", 1 - lanes.free_blocks / blocks),
        ):
            yield GaugeMetricFamily(f"{PREFIX}_{name}", text, value)
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
