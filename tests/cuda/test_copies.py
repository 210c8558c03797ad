"""The order of a card's copies, streams and events, told by a stand-in for torch's.

What it cannot tell: whether a card's own streams, events and page-locked memory do as they say.
"""

import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from step3_hetero.backends.cuda import copies
from step3_hetero.errors import TransportTimeout

CARD = torch.device("cuda", 0)


class Card:
    """Notes what is asked of torch, in order; ``done`` says whether events have come to pass."""

    def __init__(self):
        self.said = []
        self.done = True
        self.streams = ["current"]
        card = self

        class Stream:
            def __init__(self, place=None, name="side"):
                self.name = name

            def wait_stream(self, other):
                card.said.append(f"{self.name} waits for stream {other.name}")

            def wait_event(self, event):
                card.said.append(f"{self.name} waits for event on {event.on}")

        class Event:
            on = None

            def record(self, stream):
                self.on = stream.name
                card.said.append(f"event on {stream.name}")

            def query(self):
                return card.done

            def synchronize(self):
                card.said.append(f"host waits for {self.on}")

        @contextmanager
        def stream(chosen):
            card.streams.append(chosen.name)
            yield
            card.streams.pop()

        def empty(*shape, pin_memory=False, **rest):
            card.said.append("page-locked" if pin_memory else "pageable")
            return torch.empty(*shape, **rest)

        current = Stream(name="current")
        cuda = SimpleNamespace(Stream=Stream, Event=Event, stream=stream,
                               current_stream=lambda place: current)  # fmt: skip
        self.torch = SimpleNamespace(cuda=cuda, empty=empty, uint8=torch.uint8)


class Held(torch.Tensor):
    """A tensor that notes its copies."""

    card = None

    def copy_(self, source, non_blocking=False):
        how = "asynchronous" if non_blocking else "blocking"
        self.card.said.append(f"{how} copy on {self.card.streams[-1]}")
        return super().copy_(source)

    def record_stream(self, stream):
        self.card.said.append(f"memory kept for {stream.name}")


@pytest.fixture
def card(monkeypatch):
    made = Card()
    monkeypatch.setattr(copies, "torch", made.torch)
    monkeypatch.setattr(Held, "card", made)
    return made


def held(n):
    return torch.arange(float(n)).as_subclass(Held)


def test_copy_to_the_card_waits_for_readers_and_later_kernels_wait_for_it(card):
    out = held(3)
    event = copies.Copies(CARD).inward(torch.tensor([7.0, 8.0, 9.0]), out)
    assert card.said == [
        "side waits for stream current",
        "asynchronous copy on side",
        "event on side",
        "memory kept for side",
        "current waits for event on side",
    ]
    assert event.keep is not None
    event.wait()
    assert card.said[-1] == "host waits for side"
    assert event.keep is None
    assert out.tolist() == [7.0, 8.0, 9.0]


def test_copy_to_the_host_waits_for_kernels_and_none_waits_for_it(card):
    x, target = held(3), torch.zeros(3).as_subclass(Held)
    event = copies.Copies(CARD).outward(x, target)
    assert card.said == [
        "side waits for stream current",
        "asynchronous copy on side",
        "event on side",
        "memory kept for side",
    ]
    event.wait(1.0)
    assert target.tolist() == [0.0, 1.0, 2.0]


def test_streams_are_made_once(card):
    made = copies.Copies(CARD)
    assert made._stream("inward") is made._stream("inward") is not made._stream("outward")


def test_copy_that_does_not_end_is_given_up_at_its_deadline(card):
    card.done = False
    event = copies.Copies(CARD).outward(held(3), held(3))
    start = time.monotonic()
    with pytest.raises(TransportTimeout, match=r"a copy did not end within 0\.05 s"):
        event.wait(0.05)
    assert time.monotonic() - start >= 0.05
    assert event.keep is not None  # the card may still read it


def test_what_is_fetched_goes_to_page_locked_memory_and_is_waited_for(card, monkeypatch):
    monkeypatch.setattr(copies, "FETCH_S", 0.05)
    x = held(4)
    assert copies.Copies(CARD).fetched(x).tolist() == [0.0, 1.0, 2.0, 3.0]
    assert card.said == ["page-locked", "event on current"]
    card.done = False
    with pytest.raises(TransportTimeout):
        copies.Copies(CARD).fetched(x)


def test_memory_for_the_host_is_page_locked_on_a_card_alone(card):
    for place, said in ((CARD, "page-locked"), (torch.device("cpu"), "pageable")):
        card.said.clear()
        assert copies.pinned(10, place).nbytes == 10
        assert card.said == [said]


def test_what_is_placed_is_no_longer_the_callers_even_if_that_is_page_locked(card):
    """``pin_memory`` of page-locked memory is that memory, which the caller writes over."""

    class Locked(torch.Tensor):
        def pin_memory(self):
            return self

    x = torch.tensor([1.0, 2.0]).as_subclass(Locked)
    there = copies.Copies(torch.device("cpu")).placed(x, torch.float32)
    x.fill_(9.0)
    assert there.tolist() == [1.0, 2.0]
    assert card.said == ["page-locked"]
