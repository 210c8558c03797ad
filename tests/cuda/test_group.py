"""Which library a device's group is over; groups at work: tests/afd/test_tp_collective.py."""

import os
from contextlib import nullcontext
from datetime import timedelta

import pytest
import torch
from afd.collective_ranks import free_address

from step3_hetero.backend import Rendezvous
from step3_hetero.backends.cuda.device import CudaDevice
from step3_hetero.backends.torch_common import collective
from step3_hetero.errors import UnsupportedOp

MEETING = Rendezvous("127.0.0.1:1", 0, 0, 30.0)


@pytest.fixture
def card(device, monkeypatch):
    """Return the interpreted device in a card's clothes."""
    made = object.__new__(CudaDevice)
    made.__dict__.update(device.__dict__, place=torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "device", lambda place: nullcontext())
    return made


def test_interpreted_ranks_meet_over_gloo(device):
    group = device.group([0], Rendezvous(free_address(), 0, 1, 30.0))
    x = torch.arange(6.0).view(3, 2)
    assert torch.equal(group.all_reduce(x), x)
    assert torch.equal(group.all_to_all(x), x)
    group.abort()


def test_cards_meet_over_nccl(card, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(collective, "join", lambda *given: asked.append(given))
    card.group([0, 1], MEETING)
    assert asked == [([0, 1], MEETING, collective.nccl)]


def test_torch_without_nccl_is_told(card, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(UnsupportedOp, match=r"built without NCCL: no group of ranks \[0, 1\]"):
        card.group([0, 1], MEETING)


def test_a_wait_over_nccl_ends_at_its_deadline_and_no_watchdog_ends_the_process(monkeypatch):
    """torch reads the variable as it makes the group; what the user has set stays."""
    monkeypatch.delenv(collective.NCCL_BLOCKING, raising=False)
    seen = []

    class Library:
        class Options:
            pass

        def __new__(cls, store, place, size, options):
            seen.append((os.environ[collective.NCCL_BLOCKING], options._timeout))

    monkeypatch.setattr(collective.dist, "ProcessGroupNCCL", Library, raising=False)
    deadline = timedelta(seconds=3)
    collective.nccl(None, 0, 2, "127.0.0.1", deadline)
    monkeypatch.setenv(collective.NCCL_BLOCKING, "0")
    collective.nccl(None, 0, 2, "127.0.0.1", deadline)
    assert seen == [("1", deadline), ("0", deadline)]
