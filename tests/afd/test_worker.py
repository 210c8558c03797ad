"""A worker's call with numbers that are none: refused, and the worker goes on."""

import pytest

from step3_hetero.afd.link import Message
from step3_hetero.afd.messages import Kind, number_of
from step3_hetero.afd.wire import Wire
from step3_hetero.afd.worker import Worker
from step3_hetero.errors import EdgeMismatch, RoleLost
from step3_hetero.runtime.timeline import Timeline
from step3_hetero.transport.base import CorruptFrame


class Caller:
    """A link whose one message is given and which keeps what is sent."""

    def __init__(self, said):
        self.message = Message(Kind.CALL, 0, 5, said, {})
        self.sent = []

    def receive(self, deadline_s):
        return self.message

    def send(self, kind, seq, said, arrays=None, *, epoch=0):
        self.sent.append((kind, seq, said))


@pytest.mark.parametrize("key", ["call", "batch"])
@pytest.mark.parametrize(
    "value",
    [
        "x",
        [1],
        None,
        True,
        float("nan"),
        float("inf"),
        pytest.param(10**400, id="huge"),
        -(2**63),
        1e300,
    ],
)
def test_number_that_is_none_is_refused_and_the_caller_is_kept(key, value):
    worker = Worker({}, Wire(), Wire(), 4, Timeline("f:0"))
    caller = Caller({"stage": "ffn[1]", key: value})
    assert worker._from_caller(caller)
    ((kind, seq, said),) = caller.sent
    assert (kind, seq) == (Kind.FAILED, 5)
    assert said["why"].startswith(f"{key}: ")


def test_what_is_not_said_is_zero():
    assert number_of({}, "seconds") == 0.0
    assert number_of({"seconds": 2}, "seconds") == 2.0
    with pytest.raises(EdgeMismatch, match="seconds: 'x' refused; allowed: a finite number"):
        number_of({"seconds": "x"}, "seconds")


def test_caller_that_is_gone_when_asked_to_send_again_ends_its_link_alone():
    class Gone(Caller):
        def receive(self, deadline_s):
            raise CorruptFrame("a frame does not match its checksum")

        def send(self, *message):
            raise RoleLost("the peer closed the connection")

    assert not Worker({}, Wire(), Wire(), 4)._from_caller(Gone({}))
