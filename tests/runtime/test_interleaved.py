"""Passes that take turns at the same stages: what a paused one holds is not written over."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from step3_hetero import load
from step3_hetero.backend import BatchMeta, Stage
from step3_hetero.config import Config
from step3_hetero.runtime.clocks import StageClock
from step3_hetero.runtime.microbatch import Choice, MicroBatch
from step3_hetero.runtime.program import Program
from step3_hetero.runtime.resolving import resolve
from step3_hetero.specs import LOGICAL_BLOCK

DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits.yaml"


class Reusing(Stage):
    """Gives its results in arrays that its next run writes over, as a captured graph does."""

    def __init__(self, inner):
        self.spec = inner.spec
        self._inner = inner
        self._held = {}

    def plan(self, meta):
        self._inner.plan(meta)

    def run(self, inputs, out=None):
        for name, x in self._inner.run(inputs).items():
            held = self._held.setdefault(name, x.copy())
            held[...] = x
        return self._held


def prompt(ids, block):
    """Return a micro-batch: one sequence in a block of its own, the last row's logits wanted."""
    count = len(ids)
    positions = np.arange(count, dtype=np.int32)
    meta = BatchMeta(
        positions,
        positions + block * LOGICAL_BLOCK,
        np.array([0, count], np.int32),
        np.array([count], np.int32),
        np.array([[block]], np.int32),
    )
    zero = np.zeros(1)
    choice = Choice(zero, zero.astype(np.int32), zero + 1, zero)
    last = np.array([count - 1], np.int32)
    return MicroBatch(np.array(ids, np.int32), meta, last, choice, [None], want_logits=True)


@pytest.fixture(scope="module")
def parts():
    """Return a program whose FFNs are elsewhere, and those FFNs."""
    with load(DIGITS, roles__a__backend="reference") as engine:
        all_stages = engine.executor._program._stages
        graph = resolve(Config.read(DIGITS)).graph
        away = {n: s for n, s in all_stages.items() if s.node.kind == "ffn"}
        held = {
            n: replace(s, stage=Reusing(s.stage)) for n, s in all_stages.items() if n not in away
        }
        yield Program(graph, held, StageClock()), away


def sent(call):
    """Return a call whose inputs have left, as they do before another pass goes on."""
    return replace(call, inputs={name: x.copy() for name, x in call.inputs.items()})


def answered(call, meta, away):
    """Return what an FFN elsewhere makes of a call, in arrays of its own."""
    stage = away[call.node.name].stage
    stage.plan(meta)
    return {name: x.copy() for name, x in stage.run(call.inputs).items()}


def logits(program, away, batches):
    """Run micro-batches side by side, a call of each in turn; return their logits."""
    passes = [(program.run(b), b.meta) for b in batches]
    calls = [sent(next(p)) for p, _ in passes]
    found = {}
    while len(found) < len(batches):
        for n, (one, meta) in enumerate(passes):
            try:
                calls[n] = sent(one.send(answered(calls[n], meta, away)))
            except StopIteration as done:
                found[n] = done.value.logits
    return [found[n] for n in range(len(batches))]


def test_passes_side_by_side_compute_what_each_computes_alone(parts):
    batches = [prompt([21, 22, 23], 0), prompt([31, 35, 40], 1)]
    alone = [logits(*parts, [batch])[0] for batch in batches]
    together = logits(*parts, batches)
    assert not np.array_equal(*alone)
    for mine, wanted in zip(together, alone, strict=True):
        np.testing.assert_array_equal(mine, wanted)
