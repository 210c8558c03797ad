"""Ranks that form a group: one that is gone meanwhile is not waited for."""

import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
from afd.collective_ranks import free_address

from step3_hetero.afd.follower import Follower
from step3_hetero.afd.link import Link, limits
from step3_hetero.afd.messages import Kind
from step3_hetero.afd.ranks import RANKS_S, Ranks, Reduction
from step3_hetero.backend import Rendezvous
from step3_hetero.errors import TransportTimeout
from step3_hetero.graph import build_graph
from step3_hetero.model.config import step3
from step3_hetero.registry import get_backend
from step3_hetero.specs import Limits
from step3_hetero.transport.registry import get_transport

pytest.importorskip("torch")
collective = pytest.importorskip("step3_hetero.backends.torch_common.collective")

STAGE = build_graph(step3(), dtype="float32").by_name["attention[0]"]
FRAME = limits(1 << 16)
SOON_S = RANKS_S / 3
"""Far more than a closed connection takes to be seen, far less than a rank is waited for."""


@pytest.fixture
def device():
    return get_backend("cpu").open(0)


@pytest.fixture(params=["shm", "tcp"])
def listener(request):
    listening = get_transport(request.param).listen("", FRAME)
    listening.connect = lambda name, address: Link(
        get_transport(request.param).connect(address, FRAME, 5), name
    )
    yield listening
    listening.close()


def fails_soon(call):
    start = time.monotonic()
    with pytest.raises(TransportTimeout, match="one of them is gone"):
        call()
    assert time.monotonic() - start < SOON_S


def test_rank_0_does_not_wait_for_one_that_died_after_it_was_told(device, listener):
    leads = Ranks("a", 0, Reduction(0, 2), listener.connect,
                  [SimpleNamespace(device=device, node=STAGE)])  # fmt: skip

    def die():
        link = Link(listener.accept(10), "a:0")
        link.wants(Kind.MEET, 10)
        link.close()

    dies = threading.Thread(target=die)
    dies.start()
    fails_soon(lambda: leads.point({1: listener.address}))
    dies.join()
    assert not leads.is_whole
    leads.close()


def test_rank_0_waits_for_none_of_two_if_one_is_gone(device, listener):
    leads = Ranks("a", 0, Reduction(0, 3), listener.connect,
                  [SimpleNamespace(device=device, node=STAGE)])  # fmt: skip
    stays = []

    def die():
        stays.append(Link(listener.accept(10), "a:0"))
        link = Link(listener.accept(10), "a:0")
        link.wants(Kind.MEET, 10)
        link.close()

    dies = threading.Thread(target=die)
    dies.start()
    fails_soon(lambda: leads.point({1: listener.address, 2: listener.address}))
    dies.join()
    leads.close()
    stays[0].close()


@pytest.mark.parametrize("listens", [False, True], ids=["before it listens", "while it waits"])
def test_another_rank_does_not_wait_for_a_rank_0_that_is_gone(device, listener, listens):
    address, cache = free_address(), SimpleNamespace(spec=SimpleNamespace(blocks=8))
    stage = SimpleNamespace(device=device, node=STAGE)
    follower = Follower({STAGE.name: stage}, [cache], Reduction(1, 2), "a:0", Limits(8, 8, 8),
                        "a:1")  # fmt: skip
    told = listener.connect("a:1", listener.address)
    heard = Link(listener.accept(10), "a:0")
    told.send(Kind.MEET, said={"address": address, "epoch": 1})
    store = threading.Thread(target=lists, args=(address,)) if listens else None
    if store is not None:
        store.start()
    going = threading.Timer(0.5, told.close)
    going.start()
    start = time.monotonic()
    assert not follower._from_caller(heard)
    assert time.monotonic() - start < SOON_S
    going.join()
    heard.close()
    if store is not None:
        store.join()


def lists(address):
    """Be a rank 0 that listens and waits, for three seconds, for a rank that never comes."""
    with pytest.raises(TransportTimeout):
        get_backend("cpu").open(0).group([0, 7], Rendezvous(address, 0, 9, 3.0))


def test_a_rank_that_came_and_died_is_waited_for_no_longer_than_a_meeting_takes(
    device, monkeypatch
):
    monkeypatch.setattr(collective, "MEET_S", 1.0)
    address = free_address()
    host, port = address.split(":")

    def come_and_die():
        deadline = timedelta(seconds=RANKS_S)
        store = collective.dist.TCPStore(host, int(port), timeout=deadline, wait_for_workers=False)
        collective.dist.PrefixStore("epoch 1", store).set("here 1", b"")

    comes = threading.Timer(0.5, come_and_die)
    comes.start()
    start = time.monotonic()
    with pytest.raises(TransportTimeout, match=r"ranks \[0, 1\] did not all come"):
        device.group([0, 1], Rendezvous(address, 0, 1, RANKS_S))
    assert time.monotonic() - start < SOON_S
    comes.join()


def test_ranks_that_met_may_be_apart_for_longer_than_a_meeting_takes(device, monkeypatch):
    monkeypatch.setattr(collective, "MEET_S", 1.0)
    address, sums = free_address(), []

    def add(rank, late_s):
        group = device.group([0, 1], Rendezvous(address, rank, 1, RANKS_S))
        time.sleep(late_s)
        sums.append(float(group.all_reduce(device.from_host(np.ones(1, np.float32)))))

    ranks = [threading.Thread(target=add, args=(rank, 2.5 * rank)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert sums == [2.0, 2.0]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_meeting_that_is_off_is_left_whoever_is_missing(device, rank):
    asked = []

    def is_off():
        asked.append(1)
        return len(asked) == 3

    meeting = Rendezvous(free_address(), rank, 1, RANKS_S, is_off)
    fails_soon(lambda: device.group([0, 1], meeting))
    assert len(asked) == 3
