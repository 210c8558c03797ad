"""Decode steps as graphs, on the stand-in's: what a card adds is not tried here."""

import inspect
import json
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from step3_hetero.backend import BatchMeta
from step3_hetero.backends.ascend import driver, graphs
from step3_hetero.backends.ascend.limits import LimitExceeded
from step3_hetero.backends.torch_common.graphs import GraphedStage, bucket_of
from step3_hetero.conformance.stages import StageCase
from step3_hetero.errors import ConfigError, PlacementError, TransportTimeout
from step3_hetero.specs import Limits

LIMITS = Limits(tokens=512, seqs=512, blocks_per_seq=8)
RUNTIME = json.loads((Path(__file__).with_name("device") / "schemas.json").read_text())["runtime"]
STEPS = ((3, [130, 7, 256]), (2, [131, 8]), (3, [132, 9, 200]), (1, [12]), (3, [133, 10, 201]))


@pytest.fixture(scope="module")
def graphing(backend):
    """Return a device that captures graphs."""
    return backend.open(0, {"graphs": True})


def meta(contexts, tables=None):
    n = len(contexts)
    positions = np.array(contexts, np.int32) - 1
    tables = np.arange(2 * n, dtype=np.int32).reshape(n, 2) if tables is None else tables
    slots = tables[np.arange(n), positions // 128] * 128 + positions % 128
    return BatchMeta(positions, slots.astype(np.int32), np.arange(n + 1, dtype=np.int32),
                     np.array(contexts, np.int32), tables)  # fmt: skip


def steps_of(plain, graphed, first, inputs):
    """Run batches of several sizes one after another; yield each array's results, plain first."""
    for rows, contexts in STEPS:
        step = meta(contexts, first.block_tables[:rows])
        given = {n: x[:rows].clone() for n, x in inputs.items()}
        found = []
        for stage in (plain, graphed):
            stage.plan(step)
            out = stage.run({n: x.clone() for n, x in given.items()})
            found.append({n: x.cpu().clone() for n, x in out.items()})
        for name, x in found[0].items():
            yield x, found[1][name]


@pytest.mark.parametrize(("kind", "kv"), [("attention", ""), ("attention", "int8"), ("ffn", "")])
def test_replayed_steps_give_what_plain_ones_give(kind, kv, device, graphing):
    case = StageCase(kind, "bfloat16", "odd", 1, (1, 1, 1), (130, 7, 256), kv=kv)
    first = case.inputs()
    plain, graphed = (case.place(d, first, "bfloat16") for d in (device, graphing))
    assert isinstance(graphed.stages[0], GraphedStage)
    compared = 0
    for want, got in steps_of(plain.stages[0], graphed.stages[0], first.meta, plain.arrays):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        compared += 1
    assert compared == len(STEPS) * (4 if kind == "attention" else 1)
    assert sorted(graphed.stages[0].steps) == [1, 2, 4]
    if kind == "attention":
        blocks = list(range(case.place(device, first, "bfloat16").cache.spec.blocks))
        for a, b in zip(plain.cache.read(blocks), graphed.cache.read(blocks), strict=True):
            assert np.array_equal(a, b)


def test_step_is_not_captured_twice(graphing, monkeypatch):
    captured = []
    monkeypatch.setattr(graphs.AclGraph, "__init__", _noting(graphs.AclGraph.__init__, captured))
    case = StageCase("ffn", "bfloat16", "odd", 1, (1, 1, 1), (130, 7, 256))
    first = case.inputs()
    placed = case.place(graphing, first, "bfloat16")
    for _ in range(3):
        placed.stages[0].plan(first.meta)
        placed.stages[0].run(dict(placed.arrays))
    assert len(captured) == 1


def _noting(function, calls):
    def noted(self, *args):
        calls.append(args)
        function(self, *args)

    return noted


def test_prompts_run_as_they_come(device, graphing):
    case = StageCase("attention", "bfloat16", "odd", 1, (6, 1, 1), (106, 129, 1))
    first = case.inputs()
    found = []
    for one in (device, graphing):
        placed = case.place(one, first, "bfloat16")
        placed.stages[0].plan(first.meta)
        found.append(placed.stages[0].run(dict(placed.arrays))["u"].cpu())
    assert torch.equal(*found)
    assert placed.stages[0].steps == {}


@pytest.mark.parametrize(
    ("tokens", "bucket"), [(1, 1), (3, 4), (129, 256), (256, 256), (257, None), (0, None)]
)
def test_decoding_batch_is_padded_to_a_power_of_two_that_the_spare_block_holds(tokens, bucket):
    batch = meta([5] * tokens)
    assert bucket_of(batch, LIMITS, graphs.LARGEST_BUCKET) == bucket
    if bucket:
        held = graphs.DecodeBatch(bucket, 8, 1000, torch.device("npu", 0))
        held.fill(batch)
        slots = held.slots.cpu().tolist()
        assert len(set(slots)) == bucket
        assert all(slot >= 1000 * 128 for slot in slots[tokens:])


def test_no_bucket_for_a_row_that_writes_nothing():
    one = meta([5, 6])
    masked = BatchMeta(one.positions, np.array([4, -1], np.int32), one.query_starts,
                       one.context_lens, one.block_tables)  # fmt: skip
    assert bucket_of(masked, LIMITS, 256) is None


def test_attention_in_float32_is_refused_when_built(graphing):
    case = StageCase("attention", "float32", "odd", 1, (1,), (5,))
    with pytest.raises(LimitExceeded, match="graphs, attention dtype: float32 refused"):
        case.place(graphing, case.inputs(), "float32")


@pytest.mark.parametrize("other", [{"kv_split": 128}, {"triton": True}])
def test_options_whose_launches_follow_the_contexts_are_refused_beside_it(other, backend):
    with pytest.raises(ConfigError, match=f"option graphs: refused beside {next(iter(other))}"):
        backend.open(0, {"graphs": True, **other})


def test_runtime_without_graphs_is_told(backend, monkeypatch):
    monkeypatch.delattr(driver.module(), "NPUGraph")
    with pytest.raises(PlacementError, match="option graphs: this torch_npu has no NPUGraph"):
        backend.open(0, {"graphs": True})


def test_replay_that_does_not_end_is_told(monkeypatch):
    class Pending:
        def record(self, stream):
            """Never pass."""

        def query(self):
            return False

    graph = graphs.AclGraph(driver.module().NPUGraph(), torch.device("npu", 0))
    monkeypatch.setattr(driver.module(), "Event", Pending)
    monkeypatch.setattr(graphs, "REPLAY_S", 0.01)
    graph.replay()
    with pytest.raises(TransportTimeout, match=r"the end of a graph in 0\.01 s"):
        graph.update([1])


class Second:
    """torch.npu of a machine whose second device is not the current one; notes what it is asked."""

    def __init__(self, said):
        self.stream = driver.module().stream
        self.current = 0
        self.said = said
        self.Stream = lambda place=None: self._stream("side", place)
        self.current_stream = lambda place=None: self._stream("current", place)
        self.Event = lambda: SimpleNamespace(record=lambda stream: said.append(("event", *stream)))
        self.NPUGraph = lambda: SimpleNamespace(replay=lambda: None)

    def _stream(self, name, place):
        class Stream(tuple):
            def wait_stream(self, other):
                """Nothing is ever pending."""

        return Stream((name, self.current if place is None else place.index))

    @contextmanager
    def device(self, place):
        before, self.current = self.current, place.index
        yield
        self.current = before

    @contextmanager
    def graph(self, graph, *, stream, auto_dispatch_capture, capture_error_mode):
        self.said.append(("capture", *stream, self.current, capture_error_mode))
        yield


def test_work_is_captured_and_waited_for_on_the_device_that_holds_it(monkeypatch):
    said = []
    npu = Second(said)
    monkeypatch.setattr(driver, "module", lambda: npu)
    graph, _ = graphs.OnCard(torch.device("npu", 1))(dict)
    graph.replay()
    assert said == [("capture", "side", 1, 1, "thread_local"), ("event", "current", 1)]
    assert npu.current == 0


def test_graphs_of_a_second_device_are_refused(backend, monkeypatch):
    """torch_npu has one stream a process on which graphs are updated."""
    monkeypatch.setattr(driver, "count", lambda: 2)
    monkeypatch.setattr(graphs, "_updated", [0])
    with pytest.raises(PlacementError, match="ascend:1 refused beside ascend:0"):
        backend.open(1, {"graphs": True})
    graphs.check_runtime(0)


def captured(work, **options):
    npu = driver.module()
    graph = npu.NPUGraph()
    with npu.graph(graph, **options):
        return graph, work()


def test_capture_that_reaches_the_host_is_refused():
    x = torch.ones(2).to("npu")
    for work in (x.cpu, x.sum().item, lambda: x.copy_(torch.ones(2))):
        with pytest.raises(RuntimeError, match="reaches the host"):
            captured(work)


def test_results_hold_nothing_before_a_replay():
    x = torch.ones(2).to("npu")
    graph, y = captured(lambda: (x + 1) * 2)
    assert torch.isnan(y.cpu()).all()
    x.add_(1)
    graph.replay()
    assert y.cpu().tolist() == [6, 6]


def test_replay_without_an_update_of_its_attention_is_refused(graphing, monkeypatch):
    case = StageCase("attention", "bfloat16", "odd", 1, (1,), (130,))
    first = case.inputs()
    stage = case.place(graphing, first, "bfloat16").stages[0]
    monkeypatch.setattr(graphs.AclGraphedStage, "refresh", lambda *_: None)
    stage.plan(first.meta)
    arrays = case.place(graphing, first, "bfloat16").arrays
    with pytest.raises(RuntimeError, match="waits for an update that did not come"):
        stage.run(dict(arrays))


@pytest.mark.parametrize("name", RUNTIME)
def test_stand_ins_runtime_has_the_vendors_parameters(name):
    found = driver.module()
    for part in name.split("."):
        found = getattr(found, part)
    assert list(inspect.signature(found).parameters) == RUNTIME[name]


def test_stages_of_other_widths_share_a_device(graphing):
    """A captured batch's tables are as wide as its stage's limits say; a device has many stages."""
    case = StageCase("attention", "bfloat16", "odd", 1, (1,), (130,))
    inner = case.place(graphing, case.inputs(), "bfloat16").stages[0].inner
    for blocks in (1, 4):
        limits = Limits(tokens=4, seqs=4, blocks_per_seq=blocks)
        stage = graphing.build(inner.spec, inner.w, inner.cache, limits)
        stage.plan(meta([100 * blocks], np.arange(blocks, dtype=np.int32)[None]))
        assert stage.inner.batch.tables.shape == (1, blocks)
