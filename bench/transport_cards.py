"""A round trip between two emulated cards whose copies take their time: 7.3 MB out, 14.7 MB back.

Both ends copy at ``COPY_BYTES_PER_S`` to and from their host, whatever the network does meanwhile:
one after the other, or in pieces that are on the wire while the next ones are copied. Unlike a
card's, these copies cost the processor a copy too, on the core that sends or receives: that part
of them does not overlap, and the gain is less than a card's.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ml_dtypes
import numpy as np

from step3_hetero.afd.leaving import Leaving
from step3_hetero.afd.link import Link, Message, limits
from step3_hetero.afd.messages import Kind
from step3_hetero.afd.wire import Wire
from step3_hetero.backend import Array
from step3_hetero.config import Emulate
from step3_hetero.emulate.card import EmulatedCard, dtypes_of, listed
from step3_hetero.emulate.device import EmulatedDevice
from step3_hetero.registry import get_backend
from step3_hetero.specs import TensorSpec
from step3_hetero.transport.base import Channel
from step3_hetero.transport.registry import get_transport

COPY_BYTES_PER_S = 10e9
"""Of a PCIe 3.0 card of 16 lanes, or half of a PCIe 4.0 one."""

SHAPE = (1024, 7168)
"""A prompt's chunk: what 128 tokens take is two pieces and four."""
OUT, BACK = "int8", "bfloat16"
LIMITS = limits(1 << 24)


class Side:
    """One end: a card and the link that its arrays take."""

    def __init__(self, channel: Channel, *, in_pieces: bool) -> None:
        asked = Emulate(card="h800", copy_bytes_per_s=COPY_BYTES_PER_S)
        card = listed("h800")
        self.device = EmulatedDevice(
            get_backend("reference").open(0), EmulatedCard(card, asked, 0, dtypes_of(card))
        )
        self.link = Link(channel, "the peer")
        self._in_pieces = in_pieces
        if in_pieces:
            self.link.land_on(self.device)

    def send(self, kind: Kind, x: Array, dtype: str) -> None:
        """Send an array of the card."""
        sent = Leaving(self.device)
        sent.add("u", x, dtype)
        if not self._in_pieces:
            sent.wait()
        self.link.send(kind, arrays=sent)

    def received(self, dtype: str) -> Array | None:
        """Return an array that has come, on the card; None: the peer is done."""
        message: Message = self.link.receive(60)
        if message.kind == Kind.STOP:
            return None
        specs = {"u": TensorSpec("u", ("tokens", "hidden"), dtype)}
        return Wire().to_device(self.device, message.arrays, specs, message.landed)["u"]


def _answer(core: int, stay: Callable[[int], None], address: str, in_pieces: bool) -> None:
    stay(core)
    side = Side(get_transport("tcp").connect(address, LIMITS, 30), in_pieces=in_pieces)
    back = np.zeros(SHAPE, ml_dtypes.bfloat16)
    while side.received(OUT) is not None:
        side.send(Kind.ANSWER, back, BACK)
    side.link.close()


@contextmanager
def cards(core: int, stay: Callable[[int], None], in_pieces: bool) -> Iterator[Callable[[], None]]:
    """Give a round trip over tcp between a card here and one of a process on ``core``."""
    listener = get_transport("tcp").listen("", LIMITS)
    process = multiprocessing.get_context("spawn").Process(
        target=_answer, args=(core, stay, listener.address, in_pieces)
    )
    process.start()
    side, out = Side(listener.accept(60), in_pieces=in_pieces), np.zeros(SHAPE, np.int8)

    def trip() -> None:
        side.send(Kind.CALL, out, OUT)
        assert side.received(BACK) is not None

    yield trip
    side.link.send(Kind.STOP)
    process.join()
    side.link.close()
    listener.close()
