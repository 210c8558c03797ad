"""Spans: bounded, by one clock, and drawn so that nothing under way at a time shares a letter."""

import numpy as np
import pytest

from step3_hetero.errors import EdgeMismatch
from step3_hetero.runtime.timeline import SEND, TAKE, Span, Timeline, spans_of
from step3_hetero.runtime.trace_file import bubbles, chrome_trace, covered_s, lane_letters


def span(who, start, end, batch=1, kind="ffn", call=0):
    return Span(who, kind, "ffn[1]", batch, start, end, 8, call)


def drawn(seed, count=60):
    """Return spans of two instances and overlapping micro-batches."""
    rng = np.random.default_rng(seed)
    starts = rng.random(count) * 10
    return [
        span(f"f:{n % 2}", s, s + w, batch=n // 4)
        for n, (s, w) in enumerate(zip(starts, rng.random(count), strict=True))
    ]


def test_oldest_spans_go_first_and_are_counted():
    timeline = Timeline("a:0", most=3)
    for n in range(5):
        timeline.add("attention", f"attention[{n}]", n, n + 1)
    assert [s.stage for s in timeline.spans()] == ["attention[2]", "attention[3]", "attention[4]"]
    assert timeline.dropped == 2
    assert "2 older dropped" in chrome_trace(timeline.spans(), 2)["otherData"]["shows"]


def test_span_goes_by_its_role_where_one_process_has_all():
    timeline = Timeline()
    timeline.batch = 7
    timeline.add("ffn", "ffn[1]", 0.0, 1.0, role="f")
    assert timeline.spans() == [Span("f", "ffn", "ffn[1]", 7, 0.0, 1.0)]


def test_spans_come_back_from_a_message_by_the_readers_clock():
    timeline = Timeline("f:0")
    timeline.add(SEND, "ffn[1]", 1.0, 2.0, 64, 9)
    told = timeline.drain()
    assert timeline.spans() == []
    assert spans_of(told) == [Span("f:0", SEND, "ffn[1]", 0, 1.0, 2.0, 64, 9)]
    assert spans_of(told, -0.5)[0].start_s == 0.5
    with pytest.raises(EdgeMismatch, match="not told in spans"):
        spans_of([["f:0", SEND]])


@pytest.mark.parametrize("seed", range(5))
def test_covered_seconds_equal_a_count_on_a_fine_grid(seed):
    spans = drawn(seed)
    grid = np.arange(0, 12, 1e-3)
    inside = np.zeros(len(grid), bool)
    for s in spans:
        inside |= (grid >= s.start_s) & (grid < s.end_s)
    covered = covered_s((s.start_s, s.end_s) for s in spans)
    assert covered == pytest.approx(inside.sum() * 1e-3, abs=len(spans) * 2e-3)


def test_busy_and_idle_fill_the_window_of_every_instance():
    spans = drawn(1)
    window = max(s.end_s for s in spans) - min(s.start_s for s in spans)
    found = bubbles(spans)
    assert [b.who for b in found] == ["f:0", "f:1"]
    for b in found:
        assert b.window_s == pytest.approx(window) and b.busy_s + b.idle_s == pytest.approx(window)
        mine = [(s.start_s, s.end_s) for s in spans if s.who == b.who]
        assert b.busy_s == covered_s(mine) < window


def test_no_two_micro_batches_under_way_share_a_letter():
    spans = drawn(2)
    letters = lane_letters(spans)
    ends = {}
    for batch in letters:
        mine = [s for s in spans if s.batch == batch]
        ends[batch] = (min(s.start_s for s in mine), max(s.end_s for s in mine))
    for a, (start, end) in ends.items():
        for b, (other_start, other_end) in ends.items():
            if a < b and start < other_end and other_start < end:
                assert letters[a] != letters[b]
    assert lane_letters([span("a:0", 0, 1, 1), span("a:0", 2, 3, 2)]) == {1: "A", 2: "A"}


def test_trace_has_a_row_for_each_instance_and_an_arrow_for_each_crossing():
    spans = [
        span("a:0", 10.0, 10.1, kind=SEND, call=4),
        span("f:0", 10.1, 10.2, kind=TAKE, call=4),
        span("f:0", 10.2, 10.5),
    ]
    events = chrome_trace(spans)["traceEvents"]
    names = {e["args"]["name"] for e in events if e["ph"] == "M"}
    assert names == {"role a", "role f", "a:0", "f:0"}
    slices = [e for e in events if e["ph"] == "X"]
    assert [e["ts"] for e in slices] == pytest.approx([0.0, 1e5, 2e5])
    assert [e["dur"] for e in slices] == pytest.approx([1e5, 1e5, 3e5])
    (leaves,), (arrives,) = ([e for e in events if e["ph"] == p] for p in "sf")
    assert leaves["id"] == arrives["id"] and leaves["ts"] < arrives["ts"]
    assert leaves["pid"] != arrives["pid"]
