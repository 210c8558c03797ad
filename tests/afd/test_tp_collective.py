"""Collectives between processes: alike on every rank, ended within the deadline, built again."""

import os
import signal

import ml_dtypes
import numpy as np
import pytest
from afd.collective_ranks import Rank, free_address

from step3_hetero.backend import Rendezvous
from step3_hetero.errors import PlacementError, UnsupportedOp
from step3_hetero.registry import get_backend

pytest.importorskip("torch")

pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.processes]

SIZE = 3
PATIENT_S = 60.0
BRIEF_S = 6.0
LOOPBACK = "0100007F"


@pytest.fixture
def ranks():
    """Return three processes that have not met yet."""
    started = [Rank(n) for n in range(SIZE)]
    yield started
    for rank in started:
        rank.end()


def join(ranks, address, epoch, deadline_s=PATIENT_S):
    """Let ranks form a group; return what each of them says of it."""
    for rank in ranks:
        numbers = list(range(SIZE))
        rank.ask("join", numbers, address, rank.number, epoch, deadline_s)
    return [rank.answer()[0] for rank in ranks]


def each(ranks, what, arrays):
    """Let every rank do the same with its own array; return results and seconds."""
    for rank, x in zip(ranks, arrays, strict=True):
        rank.ask(what, x)
    return zip(*(rank.answer() for rank in ranks), strict=True)


def drawn(dtype, rows):
    rng = np.random.default_rng(rows)
    return [(10.0**n * rng.standard_normal((rows, 5))).astype(dtype) for n in range(SIZE)]


def in_order(arrays):
    """Return the sum as the contract words it."""
    total = arrays[0].astype(np.float32)
    for x in arrays[1:]:
        total = total + x.astype(np.float32)
    return total.astype(arrays[0].dtype)


def test_results_are_alike_on_every_rank_to_the_bit_and_only_loopback_listens(ranks):
    said = join(ranks, free_address(), epoch=1)
    assert said == [((0, 1, 2), place, 1, SIZE) for place in range(SIZE)]
    for dtype in (np.float32, ml_dtypes.bfloat16):
        for rows in (0, 1, 7):
            arrays = drawn(dtype, rows)
            sums, _ = each(ranks, "all_reduce", arrays)
            for got in sums:
                assert got.dtype == dtype and got.tobytes() == in_order(arrays).tobytes()
            gathered, _ = each(ranks, "all_gather", arrays)
            for got in gathered:
                assert got.tobytes() == np.concatenate(arrays).tobytes()
    arrays = drawn(np.float32, 2 * SIZE)
    exchanged, _ = each(ranks, "all_to_all", arrays)
    for place, got in enumerate(exchanged):
        part = slice(2 * place, 2 * place + 2)
        np.testing.assert_array_equal(got, np.concatenate([x[part] for x in arrays]))
    refused, _ = each(ranks, "all_to_all", drawn(np.float32, 2))
    assert refused == ("UnsupportedOp: 2 rows over 3 ranks; allowed: multiples",) * SIZE
    for rank in ranks:
        rank.ask("listening")
        listens = rank.answer()[0]
        assert listens and set(listens) == {LOOPBACK}


@pytest.mark.parametrize("lost", [0, 1])
def test_killed_rank_ends_the_group_within_the_deadline_and_a_new_epoch_works(ranks, lost):
    address = free_address()
    join(ranks, address, epoch=1, deadline_s=PATIENT_S)
    ranks[lost].end()
    left = [rank for rank in ranks if rank.number != lost]
    said, seconds = each(left, "all_reduce", drawn(np.float32, 4)[: len(left)])
    for rank, words in zip(left, said, strict=True):
        others = [n for n in range(SIZE) if n != rank.number]
        assert words.startswith(f"TransportTimeout: all_reduce with ranks {others}, epoch 1: one ")
    assert max(seconds) < PATIENT_S  # a closed connection is seen at once
    again, _ = each(left, "all_gather", drawn(np.float32, 4)[: len(left)])
    assert all("the group has ended; build it again, epoch higher" in words for words in again)
    ranks[lost] = Rank(lost)
    join(ranks, address, epoch=2)
    arrays = drawn(np.float32, 4)
    sums, _ = each(ranks, "all_reduce", arrays)
    assert {x.tobytes() for x in sums} == {in_order(arrays).tobytes()}


def test_rank_that_stands_still_is_given_up_after_the_deadline(ranks):
    join(ranks, free_address(), epoch=1, deadline_s=PATIENT_S)
    address = free_address()
    assert join(ranks, address, epoch=2, deadline_s=BRIEF_S)[0][2] == 2
    os.kill(ranks[1].process.pid, signal.SIGSTOP)
    left = [ranks[0], ranks[2]]
    said, seconds = each(left, "all_reduce", drawn(np.float32, 4)[:2])
    assert all(w.startswith("TransportTimeout: all_reduce with ranks") for w in said)
    assert max(seconds) < PATIENT_S / 2


def test_rank_of_another_epoch_is_never_met(ranks):
    address = free_address()
    join(ranks, address, epoch=3)
    for rank in ranks[:2]:
        rank.ask("join", [0, 1], address, rank.number, 4 + rank.number, BRIEF_S)
    said = [rank.answer()[0] for rank in ranks[:2]]
    for number, words in enumerate(said):
        wanted = f"TransportTimeout: ranks [0, 1] did not all come to {address} for epoch "
        assert words.startswith(f"{wanted}{4 + number} within {BRIEF_S:g} s: ")


@pytest.mark.parametrize("numbers", [[0, 1], [2, 2]])
def test_rank_that_is_none_of_the_group_is_refused(numbers):
    device = get_backend("cpu").open(0)
    with pytest.raises(PlacementError, match=r"rank 2 in a group of ranks"):
        device.group(numbers, Rendezvous("127.0.0.1:9", 2, 0, 1.0))


def test_backend_without_collectives_says_so():
    device = get_backend("reference").open(0)
    with pytest.raises(UnsupportedOp, match="reference:0 has no collectives, asked for ranks"):
        device.group([0], Rendezvous("127.0.0.1:9", 0, 0, 1.0))
