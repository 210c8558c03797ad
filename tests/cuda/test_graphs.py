"""Decoding from fixed, padded arrays, with a capture that runs the work again in graph's place.

What a card adds, the capture itself, is not tried here.
"""

import numpy as np
import pytest
import torch

from step3_hetero.backend import BatchMeta
from step3_hetero.backends.cuda.device import CudaDevice
from step3_hetero.backends.cuda.graphs import CudaGraphedStage
from step3_hetero.backends.torch_common.graphs import bucket_of
from step3_hetero.conformance.stages import StageCase
from step3_hetero.errors import ConfigError, UnsupportedOp
from step3_hetero.registry import get_backend
from step3_hetero.specs import Limits

LIMITS = Limits(tokens=64, seqs=64, blocks_per_seq=8)


class Again:
    """In a graph's place: does the work again and fills the same arrays."""

    def __init__(self, work, results):
        self.work = work
        self.results = results
        self.replays = 0

    def replay(self):
        self.replays += 1
        for name, x in self.work().items():
            self.results[name].copy_(x)


def pretend(made):
    def capture(work):
        results = {n: x.clone() for n, x in work().items()}
        made.append(Again(work, results))
        return made[-1], results

    return capture


def meta(contexts, tables=None):
    n = len(contexts)
    positions = np.array(contexts, np.int32) - 1
    tables = np.arange(2 * n, dtype=np.int32).reshape(n, 2) if tables is None else tables
    slots = tables[np.arange(n), positions // 128] * 128 + positions % 128
    return BatchMeta(positions, slots.astype(np.int32), np.arange(n + 1, dtype=np.int32),
                     np.array(contexts, np.int32), tables)  # fmt: skip


@pytest.mark.parametrize(("tokens", "bucket"), [(1, 1), (2, 2), (3, 4), (17, 32), (64, 64)])
def test_decoding_batch_is_padded_to_a_power_of_two(tokens, bucket):
    assert bucket_of(meta([5] * tokens), LIMITS, 64) == bucket


def test_no_bucket_for_prompts_padding_nothing_and_too_much():
    one = meta([5])
    starts = np.array([0, 2], np.int32)
    prompt = BatchMeta(np.arange(2, dtype=np.int32), one.slots.repeat(2), starts,
                       np.array([2], np.int32), one.block_tables)  # fmt: skip
    assert bucket_of(prompt, LIMITS, 64) is None
    padded = BatchMeta(one.positions.repeat(2), one.slots.repeat(2), one.query_starts,
                       one.context_lens, one.block_tables)  # fmt: skip
    assert bucket_of(padded, LIMITS, 64) is None
    assert bucket_of(meta([]), LIMITS, 64) is None
    assert bucket_of(meta([5] * 65), LIMITS, 64) is None
    assert bucket_of(meta([5], np.zeros((1, 9), np.int32)), LIMITS, 64) is None


@pytest.mark.parametrize("kind", ["attention", "ffn"])
def test_padded_steps_give_what_plain_ones_give(kind, device):
    """Batches of several sizes one after another: nothing of a step may be left in the next."""
    made, batches = [], {}
    case = StageCase(kind, "float32", "odd", 1, (1, 1, 1), (130, 7, 256))
    first = case.inputs()
    plain, padded = (case.place(device, first, "float32") for _ in range(2))
    stage = CudaGraphedStage(padded.stages[0].inner, LIMITS, device.place, batches, pretend(made))
    for rows, contexts in ((3, [130, 7, 256]), (2, [131, 8]), (3, [132, 9, 200]), (1, [12])):
        tables = first.meta.block_tables[:rows]
        step = meta(contexts, tables)
        inputs = {n: x[:rows].clone() for n, x in plain.arrays.items()}
        found = []
        for one in (plain.stages[0], stage):
            one.plan(step)
            given = {n: x.clone() for n, x in inputs.items()}
            found.append({n: x.clone() for n, x in one.run(given).items()})
        for name, x in found[0].items():
            torch.testing.assert_close(found[1][name], x, rtol=1e-4, atol=1e-5)
    assert sorted(batches) == [1, 2, 4]
    assert [graph.replays for graph in made] == [2, 1, 1]


def test_batch_whose_bucket_is_beyond_the_limits_runs_as_it_comes(device):
    batches = {}
    inner = StageCase("ffn", "float32", "odd", 1, (1,), (5,))
    inner = inner.place(device, inner.inputs(), "float32").stages[0].inner
    stage = CudaGraphedStage(inner, Limits(3, 3, 8), device.place, batches, pretend([]))
    stage.plan(meta([5, 6, 7]))
    assert (stage.bucket, batches) == (None, {})
    stage.plan(meta([5, 6]))
    assert (stage.bucket, [*batches]) == (2, [2])


def test_graphs_need_a_card():
    with pytest.raises(ConfigError, match="option graphs: needs a card"):
        get_backend("cuda").open(0, {"interpret": True, "graphs": True})


def test_replayed_step_is_looked_at_too():
    """A replay does not pass the cache's own look."""
    device = get_backend("cuda").open(0, {"interpret": True, "check_indices": True})
    case = StageCase("attention", "float32", "odd", 1, (1,), (130,))
    inner = case.place(device, case.inputs(), "float32").stages[0].inner
    stage = CudaGraphedStage(inner, LIMITS, device.place, {}, pretend([]))
    with pytest.raises(UnsupportedOp, match="block 9999 is not in this cache"):
        stage.plan(meta([5], np.array([[0, 9999]], np.int32)))


def test_stages_of_other_widths_share_a_device(device):
    """A captured batch's tables are as wide as its stage's limits say; a device has many stages."""
    card = object.__new__(CudaDevice)
    card.__dict__.update(device.__dict__, options={**device.options, "graphs": True})
    card._capture = pretend([])
    for blocks in (1, 4):
        case = StageCase("attention", "float32", "odd", 1, (1,), (100 * blocks,))
        inner = case.place(device, case.inputs(), "float32").stages[0].inner
        limits = Limits(tokens=4, seqs=4, blocks_per_seq=blocks)
        stage = card._build(inner.spec, inner.w, inner.cache, limits)
        stage.plan(meta([100 * blocks], np.arange(blocks, dtype=np.int32)[None]))
        assert stage.inner.batch.tables.shape == (1, blocks)
