"""A device in a card's place: the host's numbers, the card's memory, dtypes and pace."""

import time

import ml_dtypes
import numpy as np
import pytest
from oracle.random_checkpoint import write_checkpoint

from emulate.cards import card
from step3_hetero.backend import Stage
from step3_hetero.emulate.device import EmulatedDevice, SlowStage
from step3_hetero.emulate.link import Link, travel
from step3_hetero.errors import PlacementError, TransportTimeout, UnsupportedOp
from step3_hetero.graph import build_graph
from step3_hetero.model.checkpoint import Checkpoint
from step3_hetero.model.config import ModelConfig
from step3_hetero.registry import get_backend
from step3_hetero.runtime.held import stage_bytes
from step3_hetero.runtime.loader import load_stages, open_cache, stage_weights
from step3_hetero.specs import Limits

BLOCKS = 3
LIMITS = Limits(tokens=8, seqs=4, blocks_per_seq=2)


def device(name="h800", backend="reference", **asked):
    return EmulatedDevice(get_backend(backend).open(0), card(name, **asked))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("tiny") / "model", moe_layers_enum="1")
    return Checkpoint.open(folder, ModelConfig.read(folder))


@pytest.fixture(scope="module")
def graph(checkpoint):
    return build_graph(checkpoint.config, dtype="bfloat16")


def all_bytes(graph, weight_format="auto"):
    """Return what check counts of the whole model, norm scales left out, and of its caches."""
    norms = sum(2 * p.elements for s in graph.stages for p in s.params if p.spec is None)
    caches = sum(s.spec.cache(BLOCKS).nbytes for s in graph.stages if s.kind == "attention")
    return sum(stage_bytes(s, weight_format) for s in graph.stages) - norms + caches


def loaded(target, graph, checkpoint, weight_format="auto"):
    devices = {stage.name: ("a", target, weight_format) for stage in graph.stages}
    return load_stages(graph, devices, checkpoint, LIMITS, BLOCKS)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("weight_format", ["auto", "int8"])
def test_weights_and_caches_count_as_check_counts_them(backend, weight_format, graph, checkpoint):
    target = device(backend=backend)
    held = loaded(target, graph, checkpoint, weight_format)
    memory = target.memory()
    assert memory.total_bytes == 80_000_000_000
    assert memory.total_bytes - memory.free_bytes == all_bytes(graph, weight_format)
    del held
    assert target.memory().free_bytes == memory.total_bytes


def test_a_stage_that_does_not_fit_is_refused_with_what_was_asked_and_free(graph, checkpoint):
    need = all_bytes(graph)
    fits = device("ascend-910b", memory=need / 64e9)
    assert loaded(fits, graph, checkpoint)
    small = device("ascend-910b", memory=(need - 100) / 64e9)
    with pytest.raises(PlacementError) as full:
        loaded(small, graph, checkpoint)
    said = str(full.value)
    assert said.startswith("role a, stage head: ascend-910b emulated on reference:0 has ")
    assert f"bytes free of {need - 100:,}, asked for " in said
    assert said.endswith("raise emulate.memory or place less on it")


def test_a_cache_that_does_not_fit_is_refused(graph):
    node = graph.by_name["attention[0]"]
    small = device(memory=(node.spec.cache(BLOCKS).nbytes - 1) / 80e9)
    with pytest.raises(PlacementError, match=f"for a KV cache of {BLOCKS} blocks"):
        open_cache(small, node, BLOCKS)


def test_weights_in_a_format_that_the_card_lacks_are_refused(graph, checkpoint):
    with pytest.raises(UnsupportedOp, match=r"ascend-910b1 emulated on .*weights in int8"):
        stage_weights(device("ascend-910b1"), graph.by_name["ffn[1]"], checkpoint, "int8")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_casts_to_what_the_card_lacks_are_refused_and_others_are_the_hosts(backend):
    x = np.linspace(-3, 3, 256, dtype=np.float32).reshape(2, 128)
    h800, ascend = device("h800", backend), device("ascend-910b", backend)
    host = get_backend(backend).open(0)
    for dtype in ("float8_e4m3fn", "int8"):
        got = h800.kernel("quantise")(h800.from_host(x), dtype=dtype)
        want = host.kernel("quantise")(host.from_host(x), dtype=dtype)
        for mine, theirs in zip(got, want, strict=True):
            assert h800.to_host(mine).tobytes() == host.to_host(theirs).tobytes()
    for op in ("cast", "quantise"):
        with pytest.raises(UnsupportedOp, match=f"ascend-910b: op {op} to float8_e4m3fn refused"):
            ascend.kernel(op)(ascend.from_host(x), dtype="float8_e4m3fn")
    codes = x.astype(ml_dtypes.float8_e4m3fn)
    assert h800.to_host(h800.from_host(codes)).dtype == ml_dtypes.float8_e4m3fn
    with pytest.raises(UnsupportedOp, match="holds no float8_e4m3fn"):
        ascend.from_host(codes)


class Clock:
    """Time as a test tells it: ``sleep`` is noted, and passes."""

    def __init__(self):
        self.now, self.slept = 0.0, []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


class Ticking(Clock):
    """Time that passes in looking at it, too: who waits by looking comes to an end."""

    def monotonic(self):
        self.now += 1e-6
        return self.now


class Sleeping(Stage):
    """A stage whose run takes a known time."""

    spec = None

    def __init__(self, clock):
        self.clock = clock

    def plan(self, meta):
        self.planned = meta

    def run(self, inputs, out=None):
        self.clock.sleep(0.125)
        return inputs


def test_slow_stage_takes_its_factor_and_gives_what_the_stage_gives(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("step3_hetero.emulate.device.time", clock)
    stage = SlowStage(Sleeping(clock), 3.0)
    stage.plan("meta")
    assert stage.inner.planned == "meta"
    assert stage.run({"x": 1}) == {"x": 1}
    assert clock.slept == [0.125, 0.25]


def test_slow_stage_sleeps_and_does_not_spin():
    stage = SlowStage(Sleeping(time), 6.0)
    busy = time.process_time()
    stage.run({})
    assert time.process_time() - busy < 0.25  # of 0.75 s


def test_stages_are_slowed_only_where_asked(graph, checkpoint):
    node = graph.by_name["embed"]
    for slow, kind in ((1.0, False), (2.0, True)):
        target = device(slow=slow)
        stage = target.build(
            node.spec, stage_weights(target, node, checkpoint, "auto"), None, LIMITS
        )
        assert isinstance(stage, SlowStage) is kind


def test_latencies_add_up_and_the_narrower_end_sets_the_rate():
    one = card("h800", latency_s=0.1, bytes_per_s=1e6).asked
    other = card("h20", latency_s=0.02, bytes_per_s=5e5).asked
    assert Link.between(one, other) == Link(0.12000000000000001, 5e5)
    assert Link.between(one, None) == Link(0.1, 1e6)
    assert not Link.between(card("h20").asked, None).slows
    harmful = card("h20", cut_every=9).asked, card("h800", cut_every=5, corrupt_every=7).asked
    assert Link.between(*harmful) == Link(corrupt_every=7, cut_every=5)


def test_bytes_between_two_devices_of_one_process_take_their_time(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("step3_hetero.emulate.link.time", clock)
    slow, plain = device(latency_s=0.125, bytes_per_s=1e6), get_backend("reference").open(0)
    for ends in ((slow, plain), (plain, slow), (slow, slow), (plain, plain)):
        travel(*ends, 250_000)
    assert clock.slept == [0.375, 0.375, 0.5]


def test_a_copy_takes_its_time_and_brings_nothing_before_it_is_waited_for(monkeypatch):
    clock, rate = Ticking(), 1e6
    monkeypatch.setattr("step3_hetero.emulate.copies.time", clock)
    slow, x = device(copy_bytes_per_s=rate), np.arange(5000, dtype=np.float32)
    host = np.zeros_like(x)
    held = slow.empty(x.shape, "float32")
    events = [slow.copy_in(x[part], held[part]) for part in (slice(0, 4000), slice(4000, 5000))]
    with pytest.raises(TransportTimeout, match="did not end within"):
        events[0].wait(0.001)
    events[1].wait(10)  # the one before it has passed too, but not been seen
    assert clock.now >= x.nbytes / rate
    events[0].wait(10)
    np.testing.assert_array_equal(slow.to_host(held), x)
    start = clock.now
    out = slow.copy_out(held, host)
    assert not host.any()
    out.wait(10)
    out.wait(10)
    np.testing.assert_array_equal(host, x)
    np.testing.assert_array_equal(slow.to_host(slow.from_host(x)), x)
    assert clock.now - start >= 3 * x.nbytes / rate


def test_fp8_is_no_more_made_on_a_card_without_it_than_sent_to_it():
    without = device("ascend-910b")
    with pytest.raises(UnsupportedOp, match="holds no float8_e4m3fn"):
        without.empty((2,), "float8_e4m3fn")
