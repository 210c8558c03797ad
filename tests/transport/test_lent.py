"""Memory of received frames: a closed channel holds none, whoever was lent some keeps it."""

import weakref

import numpy as np

from step3_hetero.transport.base import Frame, FrameLimits
from step3_hetero.transport.registry import get_transport

LIMITS = FrameLimits(1 << 16, 1 << 20, 8)


def test_closed_channel_holds_no_memory_and_a_lent_array_stays_until_it_is_dropped():
    transport = get_transport("tcp")
    listener = transport.listen("", LIMITS)
    friend = transport.connect(listener.address, LIMITS, 5)
    there = listener.accept(5)
    friend.send(Frame(3, 0, 0, b"", [b"x" * 100_000]), 5)
    lent = np.frombuffer(there.receive(5).parts[0], np.uint8)
    memory = weakref.ref(there._buffer.base)
    for end in (friend, there, listener):
        end.close()
    assert memory() is not None and (lent == ord("x")).all()
    del lent
    assert memory() is None
