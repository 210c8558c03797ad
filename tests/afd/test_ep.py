"""Sets of FFN instances in processes: one process's answers, also when a member is killed."""

import os
import signal

import pytest
from afd.questions import DIGITS, MARGIN, ONE, answers, differences, split

from step3_hetero import SamplingParams, load

pytest.importorskip("torch")

pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.processes]


@pytest.fixture(scope="module")
def together():
    return answers(**ONE)


@pytest.fixture(scope="module")
def undisturbed():
    return answers(count=8, **split(1, 2, 2))


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


@pytest.mark.parametrize("wire", [("auto", "auto"), ("int8", "bf16")], ids="/".join)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_an_edge_carries_what_check_says_to_and_from_every_member(backend, wire):
    keys = dict(zip(("transport__a2f_dtype", "transport__f2a_dtype"), wire, strict=True))
    with load(DIGITS, **split(1, 2, 2, roles__f__backend=backend, **keys)) as engine:
        engine.generate([21, 22, 23], SamplingParams(max_tokens=6, ignore_eos=True))
        says = {c["kind"]: c for c in engine.placement.to_json()["crossing"]}
        sent = {key: d.sent_bytes for key, d in engine.executor.clock.entries.items()}
    tokens = 3 + 6 - 1  # the last one is not computed any more
    assert sent["a", "send to f"] == tokens * says["A2F"]["sent_bytes_per_token"]
    assert sent["f", "send"] == tokens * says["F2A"]["sent_bytes_per_token"]
    assert says["A2F"]["sent_bytes_per_token"] == 2 * says["A2F"]["bytes_per_token"]


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
