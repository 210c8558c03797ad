"""The recorded slices, the Perfetto trace and the Gantt chart."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from report_plan import predicted

from step3_hetero.placement.gantt import draw, gantt_page
from step3_hetero.placement.simulate import Scenario, simulate
from step3_hetero.placement.simulate_loss import Loss
from step3_hetero.placement.trace import SliceRecorder, chrome_trace

REMOTE, LAYERS, MICRO_BATCHES = 56, 61, 3


def recorded(found=None, *, tokens=4, loss=None, **options):
    found = found or predicted()
    recorder = SliceRecorder(found, tokens, **options)
    return recorder, simulate(found, Scenario(tokens=tokens, loss=loss), recorder=recorder)


def test_every_service_is_one_slice():
    recorder, result = recorded()
    slices = list(recorder.slices())
    count = {what: sum(s.what == what for s in slices) for what in ("attention", "a2f", "ffn")}
    assert count["attention"] == 4 * LAYERS * MICRO_BATCHES * 2
    assert count["a2f"] == 4 * REMOTE * MICRO_BATCHES * 2
    assert count["ffn"] == 4 * REMOTE * MICRO_BATCHES
    assert max(s.end_s for s in slices) <= result.elapsed_s
    assert recorder.said == "all 4 tokens of all attention instances"


def test_no_resource_serves_two_at_a_time():
    recorder, _ = recorded()
    lanes = {}
    for s in recorder.slices():
        lanes.setdefault((s.what, s.unit), []).append(s)
    assert len(lanes) == 2 + 2 + 1 + 2
    for slices in lanes.values():
        order = sorted(slices, key=lambda s: s.start_s)
        assert all(a.end_s <= b.start_s + 1e-12 for a, b in pairwise(order))


@pytest.mark.parametrize("serves", ["together", "in-turn"])
def test_pass_starts_after_the_link_and_ends_before_the_way_back(serves):
    recorder, _ = recorded(replace(predicted(), ffn_serves=serves), tokens=2)
    at = {}
    for s in recorder.slices():
        at.setdefault((s.what, s.token, s.layer, s.micro_batch), []).append(s)
    passes = [key for key in at if key[0] == "ffn"]
    assert len(passes) == 2 * REMOTE * MICRO_BATCHES
    for _, *place in passes:
        a2f, ffn, f2a = (at[(what, *place)] for what in ("a2f", "ffn", "f2a"))
        assert len(ffn) == (2 if serves == "in-turn" else 1)
        first = min(s.end_s for s in a2f) if serves == "in-turn" else max(s.end_s for s in a2f)
        assert min(s.start_s for s in ffn) >= first
        assert min(s.start_s for s in f2a) >= min(s.end_s for s in ffn) - 1e-12


def test_trace_has_a_process_a_role_and_a_thread_an_instance():
    recorder, _ = recorded()
    trace = json.loads(json.dumps(chrome_trace(recorder)))
    events = trace["traceEvents"]
    names = {e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {"attention h800", "A2F h800", "FFN ascend-910b", "F2A h800"}
    threads = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert threads == {"instance 0", "instance 1", "link 0", "link 1", "set 0"}
    slices = [e for e in events if e["ph"] == "X"]
    assert len(slices) == sum(1 for _ in recorder.slices())
    wire = next(e for e in slices if e["cat"] == "A2F")
    first = next(s for s in recorder.slices() if s.what == "a2f")
    assert wire["ts"] == pytest.approx(first.start_s * 1e6)
    assert wire["ts"] > 4 * 300  # µs: four dense layers come before
    assert wire["dur"] == pytest.approx(200.0)
    assert wire["args"] == {"token": 0, "layer": 4}


def test_long_run_is_cut_and_says_so():
    recorder, _ = recorded(tokens=50, most_events=5000)
    assert sum(1 for _ in recorder.slices()) <= 5000
    assert recorder.tokens < 50
    assert recorder.said.startswith(f"the first {recorder.tokens} of 50 tokens")
    assert chrome_trace(recorder)["otherData"]["shows"] == recorder.said


def test_many_instances_are_shown_by_the_first_of_each_group():
    found = predicted()
    first = replace(found.attention[0], instances=40)
    found = replace(found, attention=(first, replace(first, name="other")))
    recorder, _ = recorded(found, most_instances=4)
    assert recorder.instances.tolist() == [0, 1, 40, 41]


def test_token_that_a_loss_undoes_is_not_in_the_trace():
    loss = Loss("attention", 0.09, 0.5)
    recorder, _ = recorded(loss=loss)
    in_pause = [s for s in recorder.slices() if s.end_s > 0.09 and s.start_s < 0.59]
    assert not in_pause
    assert {s.unit for s in recorder.slices() if s.what == "attention" and s.start_s > 0.59} == {1}


class Page(HTMLParser):
    """Counts elements, and keeps what would be fetched."""

    def __init__(self, text):
        super().__init__()
        self.count, self.fetched, self.text = {}, [], text
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.fetched += [v for k, v in attrs if k in ("src", "href", "xlink:href")]


def test_gantt_is_one_page_that_fetches_nothing():
    recorder, result = recorded()
    page = Page(gantt_page(recorder, result))
    assert not page.fetched and "url(" not in page.text and "@import" not in page.text
    assert page.count["svg"] == 2  # for a screen, and for a phone
    assert page.count["desc"] == 2 and page.count["table"] == 1
    assert f"{result.tpot_s['p99'] * 1e3:.2f} ms" in page.text


@pytest.mark.parametrize(("narrow", "layers"), [(False, 8), (True, 3)])
def test_gantt_bars_lie_in_the_drawing_and_show_the_first_remote_layers(narrow, layers):
    recorder, _ = recorded()
    drawing = draw(recorder, narrow=narrow)
    assert drawing.title == f"Layers 3 to {3 + layers - 1} of token 1"
    assert len(drawing.lanes) == 7
    assert all(b.x >= 0 and b.x + b.width <= drawing.width + 1e-6 for b in drawing.bars)
    per_layer = MICRO_BATCHES * 2
    assert len(drawing.bars) == per_layer * layers + (layers - 1) * MICRO_BATCHES * (2 + 2 + 1)
