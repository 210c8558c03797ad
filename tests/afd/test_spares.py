"""Instances that stand by: one takes the place of an instance that dies, and another follows it."""

import os
import signal
import time

import pytest
from afd.questions import under_way

from step3_hetero import SamplingParams, load
from step3_hetero.runtime.request import Request

pytest.importorskip("torch")
pytestmark = [
    pytest.mark.xdist_group("processes"),
    pytest.mark.processes,
    pytest.mark.usefixtures("no_leaks"),
]

PARAMS = SamplingParams(max_tokens=40, ignore_eos=True)
RECOVERY_S = 3.0
"""What a spare is for: by a restart alone the import of torch takes longer."""


def asked(engine):
    return [
        c.token_ids for c in engine.generate_all([Request([21, 22, n], PARAMS) for n in range(4)])
    ]


def wait_for(condition, deadline_s=60.0):
    until = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("role", ["f", "a"])
def test_a_spare_takes_over_at_once_and_another_is_started(write_config, role):
    config = write_config(**{f"roles__{role}__spares": 1})
    with load(config) as engine:
        executor = engine.executor
        undisturbed = asked(engine)
        for _ in range(2):  # the second time the spare is the one that was started since
            first, spare = _serving(executor, role)
            killed = executor.processes()[first]
            gaps, last = [], [time.monotonic()]

            def tick(done, total, gaps=gaps, last=last):
                gaps.append(time.monotonic() - last[0])
                last[0] = time.monotonic()

            requests = [Request([21, 22, n], PARAMS) for n in range(4)]
            with under_way(os.kill, killed, signal.SIGKILL) as strike:

                def both(done, total, tick=tick, strike=strike):
                    tick(done, total)
                    strike(done, total)

                last[0] = time.monotonic()
                done = engine.generate_all(requests, on_progress=both)
            assert [c.token_ids for c in done] == undisturbed
            assert max(gaps) < RECOVERY_S
            assert _serving(executor, role)[0] == spare
            _wait_until_all_are_ready(executor, without=killed)
            assert executor.processes()[first] != killed


def _serving(executor, role):
    """Return the names of the member that does the work and of the one that stands by."""
    seats = [s for s in executor._seats if s.member.role == role]
    (first,) = (s.member.name for s in seats if s.place is not None)
    (spare,) = (s.member.name for s in seats if s.place is None)
    return first, spare


def _wait_until_all_are_ready(executor, without=None):
    """Wait for all seats; the process ``without`` is gone from its own."""

    def ready():
        executor._attend(0.1)
        is_gone = without not in executor.processes().values()
        return is_gone and all(s.is_ready for s in executor._seats)

    wait_for(ready)


def test_a_spare_that_dies_costs_nothing_and_is_replaced(write_config):
    with load(write_config(roles__f__spares=1)) as engine:
        executor = engine.executor
        undisturbed, pid = asked(engine), executor.processes()["f:1"]
        os.kill(pid, signal.SIGKILL)
        assert asked(engine) == undisturbed
        _wait_until_all_are_ready(executor, without=pid)
