"""Roles that a test plays: it holds their side of the link to a front."""

import threading
from contextlib import suppress

import numpy as np

from step3_hetero.afd.doorman import FRONT
from step3_hetero.afd.elsewhere import Watched
from step3_hetero.afd.launcher import Launcher, Member
from step3_hetero.afd.link import Link, limits
from step3_hetero.afd.messages import Kind, result_parcel
from step3_hetero.backend import BatchMeta
from step3_hetero.errors import Step3HeteroError
from step3_hetero.runtime.microbatch import BatchResult, Choice, MicroBatch
from step3_hetero.transport.inproc import InprocTransport

CONTRACT = {"protocol": 1}
ONE = (Member("a", 0, True),)
FRAME = limits(1 << 20)
TRANSPORT = InprocTransport()


def batch():
    one, none = np.zeros(1, np.int32), np.zeros((1, 1), np.int32)
    meta = BatchMeta(one, one, np.array([0, 1], np.int32), one + 1, none)
    choice = Choice(*(np.zeros(1, np.float32) for _ in range(4)), banned=-1)
    return MicroBatch(one, meta, one, choice, [None])


RESULT = result_parcel(BatchResult(np.array([7], np.int32), [None]))


class Played(Watched):
    """A role whose side of the link the test holds."""

    def __init__(self, member, contract):
        super().__init__(member.name)
        self.contract = contract
        self.listener = TRANSPORT.listen("", FRAME)
        self.link = None
        self.tells(address=self.listener.address)
        self._thread = threading.Thread(target=self._greet, daemon=True)
        self._thread.start()

    def _greet(self):
        with suppress(Step3HeteroError):  # a front that has no use for it goes
            self.link = Link(self.listener.accept(3), FRONT)
            self.link.wants(Kind.HELLO, 10)
            self.link.send(Kind.AGREED, said={"contract": self.contract})
            self.link.wants(Kind.LOAD, 10)
            self.link.send(Kind.READY)

    def end(self, *, at_once=False):
        self.listener.close()  # nobody waits there any more
        self._thread.join(10)
        if self.link is not None:
            self.link.close()
        super().end()


class Stage(Launcher):
    def __init__(self, contracts=()):
        self.played = []
        self.contracts = list(contracts)

    def launch(self, member):
        contract = self.contracts.pop(0) if self.contracts else CONTRACT
        self.played.append(Played(member, contract))
        return self.played[-1]
