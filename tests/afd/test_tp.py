"""FFN instances of several ranks: one process's answers, a rank that dies, and what must agree."""

import os
import signal

import pytest
from afd.questions import APART, DIGITS, MARGIN, ONE, answers, differences, split

from step3_hetero import load
from step3_hetero.afd.contract import agree, edge_contract
from step3_hetero.afd.seats import Seats
from step3_hetero.errors import EdgeMismatch, RoleLost
from step3_hetero.runtime.resolving import checkpoint_folder, read_config, resolve

pytest.importorskip("torch")

pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.processes]


@pytest.fixture(scope="module")
def together():
    return answers(**ONE)


@pytest.mark.parametrize(
    "overrides",
    [split(1, 1, 1, tp=2), split(2, 2, 2, tp=2, runtime__microbatches=2)],
    ids=["tp 2", "2A2F, ep 2 x tp 2"],
)
def test_answers_of_ranks_are_one_process_s_up_to_the_order_of_sums(together, overrides):
    got = answers(**overrides)
    assert all(margin < MARGIN for margin in differences(got, together))
    bits = [[p.chosen for p in seen] for _, seen in got]
    assert bits != [[p.chosen for p in seen] for _, seen in together], "nothing was split"


def test_no_answer_changes_when_a_rank_is_killed():
    undisturbed, killed = answers(**split(1, 1, 1, tp=2)), []

    def kill(executor):
        killed.append(executor.processes()["f:1"])
        os.kill(killed[0], signal.SIGKILL)

    assert answers(disturb=kill, **split(1, 1, 1, tp=2)) == undisturbed
    assert killed


@pytest.mark.parametrize("degree", ["ep", "tp"])
def test_two_sides_that_split_otherwise_do_not_agree(degree):
    def contract(**more):
        config = read_config(DIGITS, {**APART, "roles__f__instances": 2, **more})
        return edge_contract(config, resolve(config).placement, checkpoint_folder(config))

    split_otherwise = contract(**{f"roles__f__{degree}": 2})
    with pytest.raises(EdgeMismatch, match=rf"sharding: .*{degree} 1.* and .*{degree} 2"):
        agree(contract(), split_otherwise, "a:0", "f:0")


def test_process_that_listens_in_the_place_of_another_is_refused_by_name(monkeypatch, capfd):
    where = Seats.where

    def crossed(self):
        peers = where(self)
        if len(peers.get("f", {})) == 2:
            peers["f"] = {0: peers["f"][1], 1: peers["f"][0]}
        return peers

    monkeypatch.setattr(Seats, "where", crossed)
    monkeypatch.setattr("step3_hetero.afd.front.MOST_DEATHS", 0)
    with (
        pytest.raises(RoleLost, match=r"a:0 ended"),
        load(DIGITS, **split(1, 2, 2)) as engine,
    ):
        engine.generate([21, 22, 23])
    assert "'f:1' listens there; expected 'f:0'" in capfd.readouterr().err
