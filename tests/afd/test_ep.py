"""Sets of FFN instances in processes: one process's answers, also when a member is killed."""

import os
import signal
import threading
from pathlib import Path

import pytest

from step3_hetero import SamplingParams, load
from step3_hetero.runtime.request import Request

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "examples" / "digits.yaml"
PICTURES = sorted((ROOT / "examples" / "digits").glob("*.png"))
ONE = {"roles__f__backend": "cpu", "runtime__batch_invariant": True}
APART = {**ONE, "runtime__processes": "per-role"}
LOGPROBS_WITHIN = 2e-5
MARGIN = 1e-3

pytest.importorskip("torch")

pytestmark = pytest.mark.xdist_group("processes")  # each test has processes of its own


def split(attention, ffn, ep, **more):
    """Return the overrides for so many instances of both roles."""
    instances = {"roles__a__instances": attention, "roles__f__instances": ffn}
    return {**APART, **instances, "roles__f__ep": ep, **more}


def answers(count=6, disturb=None, **overrides):
    """Return each answer's tokens and two best log-probabilities; every other one is sampled."""
    asked = [
        Request(
            "which digit is this ?",
            SamplingParams(max_tokens=8, logprobs=2, temperature=0.7 * (n % 2), seed=n),
            [PICTURES[n % len(PICTURES)]],
        )
        for n in range(count)
    ]
    with load(DIGITS, **overrides) as engine:
        if disturb is not None:
            threading.Timer(0.3, disturb, [engine.executor]).start()
        done = engine.generate_all(asked)
        assert engine.lanes.free_blocks == engine.executor.kv_blocks * engine.executor.instances
    return [(c.token_ids, c.logprobs) for c in done]


@pytest.fixture(scope="module")
def together():
    return answers(**ONE)


@pytest.fixture(scope="module")
def undisturbed():
    return answers(count=8, **split(1, 2, 2))


def differences(got, want):
    """Yield, of each answer, the margin at its first other token; hold what precedes together.

    A sampled token's rule is about its draw: here none may differ.
    """
    for number, ((tokens, seen), (wanted, known)) in enumerate(zip(got, want, strict=True)):
        pairs = zip(tokens, wanted, strict=False)  # an answer may end at its other token
        alike = next((i for i, (mine, theirs) in enumerate(pairs) if mine != theirs), len(wanted))
        for mine, theirs in zip(seen[:alike], known[:alike], strict=True):
            assert abs(mine.chosen - theirs.chosen) <= LOGPROBS_WITHIN
        if alike < len(wanted):
            assert number % 2 == 0, "a sampled token differs"
            (_, best), (_, second) = known[alike].top
            yield best - second


@pytest.mark.parametrize(
    "overrides",
    [
        split(1, 2, 2),
        split(3, 2, 2, runtime__microbatches=2),
        split(1, 4, 2),
        split(2, 3, 3),
        split(1, 2, 2, transport__kind="tcp", roles__f__backend="reference"),
    ],
    ids=["1A2F", "3A2F", "1A4F, two replicas", "2A3F, 8 experts over 3", "tcp, reference"],
)
def test_answers_of_a_set_are_one_process_s_up_to_the_order_of_sums(together, overrides):
    got = answers(**overrides)
    assert all(margin < MARGIN for margin in differences(got, together))
    bits = [[p.chosen for p in seen] for _, seen in got]
    assert bits != [[p.chosen for p in seen] for _, seen in together], "nothing was split"


def test_same_sharding_gives_the_same_bits_whoever_calls_and_in_whatever_batch(undisturbed):
    assert answers(count=8, **split(2, 4, 2, runtime__microbatches=3)) == undisturbed


@pytest.mark.parametrize("member", [0, 1])
@pytest.mark.parametrize("instances", [2, 4], ids=["restarted", "replica"])
def test_no_answer_changes_when_a_member_is_killed(undisturbed, member, instances):
    killed = []

    def kill(executor):
        killed.append(executor.processes()[f"f:{member}"])
        os.kill(killed[0], signal.SIGKILL)

    overrides = split(1, instances, 2, runtime__microbatches=2)
    assert answers(count=8, disturb=kill, **overrides) == undisturbed
    assert killed
