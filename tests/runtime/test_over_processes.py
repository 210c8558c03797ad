"""Preemption and prefix reuse with attention instances in processes: tokens of one process."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from step3_hetero import SamplingParams, load
from step3_hetero.runtime.request import Request

DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits.yaml"
INVARIANT = {"roles__f__backend": "cpu", "runtime__batch_invariant": True}
APART = {
    "runtime__processes": "per-role",
    "runtime__microbatches": 2,
    "runtime__max_batch": 1,
    "runtime__kv_blocks": 3,
    "roles__a__instances": 2,
}

pytest.importorskip("torch")

pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.processes]


def asked():
    """Return requests that outgrow a small cache; the first two are the same, all of it a block."""
    draws = np.random.default_rng(5)
    stem = draws.integers(10, 64, 128).tolist()
    others = [draws.integers(10, 64, n).tolist() for n in (120, 120, 126, 126)]
    return [
        Request(p, SamplingParams(max_tokens=10, temperature=0.5, seed=n, ignore_eos=True))
        for n, p in enumerate([stem, stem, *others])
    ]


def answers(requests, kill=False, **overrides):
    """Return the tokens of each request, and what the engine counted."""
    with load(DIGITS, **INVARIANT, **overrides) as engine:
        first = engine.generate_all(requests[:1])
        numbers = [engine.submit(r.prompt, r.params) for r in requests[1:]]
        for _ in range(6):
            engine.step()
        if kill:
            os.kill(engine.executor.processes()["a:0"], signal.SIGKILL)
        done = [*first, *engine.run(numbers)]
        while any(lane.flight for lane in engine.lanes.lanes):
            engine.step()
        stats = engine.stats()
        assert stats.free_blocks + stats.cached_blocks == stats.blocks
        told = engine.executor.cache_epoch(0) is not None  # or else no prefix is kept
    return [c.token_ids for c in done], stats, told


@pytest.fixture(scope="module")
def together():
    return answers(asked())[0]


@pytest.mark.parametrize("kill", [False, True], ids=["undisturbed", "attention killed"])
def test_tokens_are_those_of_a_roomy_cache_in_one_process(together, kill):
    tokens, stats, told = answers(asked(), kill, **APART)
    assert tokens == together
    if not kill:  # what is lost is neither shared nor given up
        assert stats.prefix_tokens_reused >= 127 or not told
        assert stats.preemptions > 0
