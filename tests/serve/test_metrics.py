"""Metrics as Prometheus reads them: over HTTP, in its own parser, and they add up."""

import urllib.request

import pytest

from step3_hetero.errors import RequestError
from step3_hetero.runtime.clocks import Durations
from step3_hetero.serve.metrics import buckets, serve_metrics

parser = pytest.importorskip("prometheus_client.parser")


@pytest.fixture
def engine():
    from pathlib import Path

    from step3_hetero import load

    pytest.importorskip("torch")
    with load(Path(__file__).resolve().parents[2] / "examples" / "digits.yaml") as engine:
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
