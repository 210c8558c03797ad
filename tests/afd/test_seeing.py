"""What is seen of roles in processes: both ends of every crossing, and seconds that add up."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from step3_hetero import SamplingParams, load
from step3_hetero.runtime.clocks import WAIT
from step3_hetero.runtime.request import Request
from step3_hetero.runtime.timeline import SEND, TAKE, Timeline
from step3_hetero.runtime.trace_file import bubbles, chrome_trace, lane_letters

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "examples" / "digits.yaml"

pytest.importorskip("torch")
pytestmark = pytest.mark.xdist_group("processes")


@pytest.fixture(scope="module")
def seen():
    """Return the spans and the clock of a run with three micro-batches under way."""
    timeline = Timeline()
    values = {"runtime__processes": "per-role", "runtime__microbatches": 3, "runtime__max_batch": 2}
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    with load(DIGITS, timeline=timeline, **values) as engine:
        engine.generate_all([Request([21 + n, 22, 23], params) for n in range(6)])
        clock = {(e["role"], e["stage"]): e for e in engine.executor.clock.to_json()}
        members = set(engine.executor.clocks)
    return timeline.spans(), clock, members


def test_every_crossing_is_seen_at_both_ends_in_order(seen):
    spans, _, _ = seen
    sent = {s.call: s for s in spans if s.kind == SEND and s.call}
    taken = {s.call: s for s in spans if s.kind == TAKE and s.call}
    last = {c for c in taken if c not in sent}
    assert len(last) <= 1  # the sending of the last answer is told with the next one
    for call in taken.keys() - last:
        leaves, arrives = sent[call], taken[call]
        assert {leaves.who, arrives.who} == {"a:0", "f:0"}
        assert leaves.start_s < arrives.end_s
        assert (leaves.stage, leaves.batch) == (arrives.stage, arrives.batch)
        assert leaves.sent_bytes == arrives.sent_bytes > 0
    assert len(taken) == len([s for s in spans if s.kind == "ffn" and s.who == "f:0"]) * 2


def test_work_of_one_instance_never_overlaps(seen):
    spans, _, _ = seen
    for who in ("a:0", "f:0"):
        mine = sorted((s.start_s, s.end_s) for s in spans if s.who == who)
        assert all(end <= start for (_, end), (start, _) in pairwise(mine))


def test_spans_and_clock_tell_the_same_seconds_and_bytes(seen):
    spans, clock, members = seen
    assert members == {"a:0"}  # it tells those of the instances that it calls, too
    for (role, kind), who in {("f", "ffn"): "f:0", ("a", "attention"): "a:0"}.items():
        summed = sum(s.end_s - s.start_s for s in spans if (s.who, s.kind) == (who, kind))
        assert summed == pytest.approx(clock[role, kind]["seconds"], rel=1e-9)
    bytes_sent = sum(s.sent_bytes for s in spans if (s.who, s.kind) == ("a:0", SEND))
    assert bytes_sent == clock["a", "send to f"]["bytes"]
    round_trip = clock["f", "ffn round trip"]
    assert round_trip["calls"] == clock["f", "ffn"]["calls"]
    assert round_trip["seconds"] > clock["f", "ffn"]["seconds"]


def test_attention_waits_no_longer_than_its_spans_leave_free(seen):
    spans, clock, _ = seen
    idle = {b.who: b.idle_s for b in bubbles(spans)}["a:0"]
    assert 0 < clock["a", WAIT]["seconds"] <= idle * 1.01


def test_three_micro_batches_have_three_letters_and_the_trace_is_json(seen):
    spans, _, _ = seen
    assert set(lane_letters(spans).values()) == {"A", "B", "C"}
    events = json.loads(json.dumps(chrome_trace(spans)))["traceEvents"]
    assert all(e["dur"] >= 0 and e["ts"] >= 0 for e in events if e["ph"] == "X")
    names = {e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    assert names == {"a:0", "f:0"}


def test_nothing_is_kept_unless_it_is_wanted():
    with load(DIGITS, runtime__processes="per-role") as engine:
        engine.generate([21, 22, 23], SamplingParams(max_tokens=2, ignore_eos=True))
        assert engine.executor.timeline is None
