"""Metrics as Prometheus reads them: over HTTP, in its own parser, and they add up."""

import urllib.request
from dataclasses import asdict
from pathlib import Path

import pytest

from step3_hetero.errors import RequestError
from step3_hetero.runtime.clocks import Durations
from step3_hetero.serve.metrics import COUNTERS, GAUGES, buckets, serve_metrics

parser = pytest.importorskip("prometheus_client.parser")

DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits.yaml"


@pytest.fixture
def engine():
    from step3_hetero import load

    pytest.importorskip("torch")
    with load(DIGITS) as engine:
        yield engine


def scraped(port):
    """Return every sample by name and labels, as the client's own parser reads the page."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        text = page.read().decode()
    return {
        (s.name, *sorted(s.labels.items())): s.value
        for family in parser.text_string_to_metric_families(text)
        for s in family.samples
    }


def test_page_counts_what_the_engine_did(engine):
    from step3_hetero import SamplingParams

    with serve_metrics(engine, 0) as port:
        before = scraped(port)
        engine.submit([1, 2, 3], SamplingParams(max_tokens=4, ignore_eos=True))
        waiting = scraped(port)
        engine.step()
        running = scraped(port)
        while running[("step3_hetero_num_requests_running",)]:
            engine.step()
            running = scraped(port)
    assert before[("step3_hetero_num_requests_waiting",)] == 0
    assert waiting[("step3_hetero_num_requests_waiting",)] == 1
    assert running[("step3_hetero_kv_cache_usage_ratio",)] == 0
    told = {(e["role"], e["stage"]): e for e in engine.executor.clock.to_json()}
    assert {"attention", "ffn", "head", "sample"} <= {stage for _, stage in told}
    for (role, stage), entry in told.items():
        labels = (("role", role), ("stage", stage))
        assert running["step3_hetero_stage_seconds_count", *labels] == entry["calls"]
        seconds = running["step3_hetero_stage_seconds_sum", *labels]
        assert seconds == pytest.approx(entry["seconds"])


def test_kv_cache_fills_while_a_request_runs(engine):
    from step3_hetero import SamplingParams

    with serve_metrics(engine, 0) as port:
        engine.submit([1, 2, 3], SamplingParams(max_tokens=4, ignore_eos=True))
        engine.step()
        found = scraped(port)
    assert found[("step3_hetero_num_requests_running",)] == 1
    assert 0 < found[("step3_hetero_kv_cache_usage_ratio",)] < 1


def test_every_count_of_the_engine_stands_on_the_page(monkeypatch):
    """Four blocks for three sequences that need two each, a beginning used again, a lost cache."""
    from step3_hetero import SamplingParams, load

    pytest.importorskip("torch")
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    with load(DIGITS, runtime__kv_blocks=4) as engine, serve_metrics(engine, 0) as port:
        for first in (20, 21, 22):
            engine.submit([first] * 120, params)
        pages = [page_and_stats(port, engine)]
        while engine._sequences:
            engine.step()
            pages.append(page_and_stats(port, engine))
        for _ in range(2):
            engine.generate([22] * 140, SamplingParams(max_tokens=1))
        monkeypatch.setattr(engine.executor, "cache_epoch", lambda instance=0: 1)
        engine.generate([22], SamplingParams(max_tokens=1))
        pages.append(page_and_stats(port, engine))
    for page, stats in pages:
        told = {**GAUGES, **{f: (f"{n}_total", t) for f, (n, t) in COUNTERS.items()}}
        assert told.keys() == stats.keys()
        assert {f: page[(f"step3_hetero_{name}",)] for f, (name, _) in told.items()} == stats
        held = stats["blocks"] - stats["free_blocks"] - stats["cached_blocks"]
        assert page[("step3_hetero_kv_cache_usage_ratio",)] == held / stats["blocks"]
    most = {field: max(stats[field] for _, stats in pages) for field in pages[0][1]}
    assert all(most.values()), most  # each of them was more than nothing, once


def page_and_stats(port, engine):
    return scraped(port), asdict(engine.stats())


def test_buckets_are_cumulative_and_hold_every_call():
    durations = Durations()
    for seconds in (0.3, 0.4, 0.6, 3.0):
        durations.add(seconds)
    assert buckets(durations) == [("0.5", 2.0), ("1.0", 3.0), ("4.0", 4.0), ("+Inf", 4.0)]


def test_port_is_free_again_afterwards_and_a_taken_one_is_refused(engine):
    with (
        serve_metrics(engine, 0) as port,
        pytest.raises(RequestError, match=f"--metrics-port {port}: .*take another one"),
        serve_metrics(engine, port),
    ):
        raise AssertionError("two servers on one port")
    with serve_metrics(engine, port) as again:
        assert again == port
