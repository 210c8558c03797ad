"""Attention instances of several ranks: one process's answers, a rank that dies, what repeats."""

import os
import signal

import numpy as np
import pytest
from afd.questions import APART, DIGITS, MARGIN, ONE, answers, differences, split

from step3_hetero import SamplingParams, load
from step3_hetero.afd.ray_roles import RayRoles
from step3_hetero.errors import ConfigError
from step3_hetero.runtime.resolving import read_config, resolve

pytest.importorskip("torch")

pytestmark = [
    pytest.mark.xdist_group("processes"),
    pytest.mark.processes,
    pytest.mark.usefixtures("no_leaks"),
]

TWO = {"roles__a__tp": 2}


@pytest.fixture(scope="module")
def together():
    return answers(**ONE)


@pytest.fixture(scope="module")
def ranks():
    """Return the answers of one attention instance of two ranks."""
    return answers(**split(1, 1, 1, **TWO))


@pytest.mark.parametrize(
    "overrides",
    [
        split(1, 1, 1, **TWO, roles__f__backend="reference"),
        split(1, 1, 1, roles__a__tp=4),
        split(2, 2, 2, tp=2, **TWO, runtime__microbatches=2),
    ],
    ids=["FFN on the reference", "tp 4", "2A2F, tp 2, ep 2 x tp 2"],
)
def test_answers_of_ranks_are_one_process_s_up_to_the_order_of_sums(together, overrides):
    got = answers(**overrides)
    assert all(margin < MARGIN for margin in differences(got, together))
    bits = [[p.chosen for p in seen] for _, seen in got]
    assert bits != [[p.chosen for p in seen] for _, seen in together], "nothing was split"


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"runtime__microbatches": 2},
        {"roles__a__instances": 2, "roles__f__instances": 2, "runtime__microbatches": 2},
        {"transport__kind": "tcp"},
        {"runtime__prefix_reuse": False},
    ],
    ids=["again", "m 2", "2A2F", "tcp", "no reuse"],
)
def test_one_sharding_gives_the_same_bits_whatever_is_under_way(ranks, more):
    assert answers(**{**split(1, 1, 1, **TWO), **more}) == ranks


@pytest.mark.parametrize("rank", ["a:0", "a:1"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
def test_no_answer_changes_when_a_rank_is_lost(ranks, rank, number):
    lost = []

    def lose(executor):
        lost.append(executor.processes()[rank])
        os.kill(lost[0], number)

    assert answers(disturb=lose, **split(1, 1, 1, **TWO, runtime__microbatches=2)) == ranks
    assert lost


@pytest.mark.parametrize("rank", ["a:2", "a:3"])
def test_a_rank_of_the_second_instance_takes_that_one_alone_along(ranks, rank):
    pids = []

    def lose(executor):
        pids.append(executor.processes())
        os.kill(pids[0][rank], signal.SIGKILL)

    def first_instance(executor):
        return {name: executor.processes()[name] for name in ("a:0", "a:1")}

    ended = []
    overrides = split(2, 1, 1, **TWO)
    assert answers(disturb=lose, ended=lambda e: ended.append(first_instance(e)), **overrides) == (
        ranks
    )
    assert ended == [{name: pids[0][name] for name in ("a:0", "a:1")}]


def test_a_follower_outlives_its_leader_and_an_instance_that_idles_is_whole_again():
    params = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=1)
    with load(DIGITS, **split(1, 1, 1, **TWO)) as engine:
        pids, want = engine.executor.processes(), engine.generate([21, 22, 23], params)
        for rank in ("a:0", "a:1"):
            os.kill(engine.executor.processes()[rank], signal.SIGKILL)
            again = engine.generate([21, 22, 23], params)
            assert (again.token_ids, again.logprobs) == (want.token_ids, want.logprobs)
            if rank == "a:0":
                assert engine.executor.processes()["a:1"] == pids["a:1"]


def test_blocks_that_are_found_and_copied_are_so_on_every_rank():
    ids = np.random.default_rng(3).integers(7, 64, 256).tolist()
    params = SamplingParams(max_tokens=4, ignore_eos=True, logprobs=1)
    with load(DIGITS, **split(1, 1, 1, **TWO)) as engine:
        first = engine.generate(ids, params)
        again = engine.generate(ids, params)
        assert engine.stats().prefix_tokens_reused == 255  # the newest one, in a copy
        assert (again.token_ids, again.logprobs) == (first.token_ids, first.logprobs)


def test_roles_that_stand_form_a_new_group_for_every_front(command, write_config, tmp_path):
    config, attach = write_config(roles__a__tp=2), tmp_path / "roles.json"
    up = command("up", config, "--json", "--attach", attach)
    up.says('"event": "up"')
    params = SamplingParams(max_tokens=16, ignore_eos=True)

    def tokens(lost=None):
        with load(config, attach=attach) as engine:
            first = engine.generate([21, 22, 23], params).token_ids
            if lost is not None:
                os.kill(lost, signal.SIGKILL)
            assert engine.generate([21, 22, 23], params).token_ids == first
        return first

    undisturbed = tokens()
    facts = next(f["roles"] for f in up.facts() if f["event"] == "up")
    follower = next(f["pid"] for f in facts if f["role"] == "a:1")
    assert tokens(lost=follower) == undisturbed
    assert tokens() == undisturbed
    up.popen.send_signal(signal.SIGTERM)
    assert up.ends() == 0


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({**APART, "roles__a__tp": 3}, r"roles\.a\.tp: 3 refused: attention\[0\] has 4 query"),
        ({"roles__a__tp": 2}, r"roles\.a\.tp: 2 refused; allowed: 1 with runtime\.processes: one"),
        ({**APART, **TWO, "roles__a__spares": 1}, r"spares: 1 with ep or tp above 1 is not"),
        ({**APART, **TWO, "roles__a__hosts": ["x"]}, r"hosts: a list with tp above 1 is not"),
        ({**APART, **TWO, "roles__a__devices": [0]}, r"devices: expected 2, got 1"),
        ({**APART, **TWO, "transport__kind": "inproc"}, r"tp: 2 of attention .* over inproc: rank"),
    ],
)
def test_ranks_that_cannot_be_are_refused_with_their_key(overrides, said):
    with pytest.raises(ConfigError, match=said):
        load(DIGITS, **overrides)


def test_ray_does_not_spread_the_ranks_of_one_instance():
    config = read_config(DIGITS, split(1, 1, 1, **TWO, transport__kind="tcp"))
    with pytest.raises(ConfigError, match=r"roles\.a\.tp: 2 of attention refused with .* ray"):
        RayRoles(resolve(config), None)
