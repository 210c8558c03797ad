"""A copy between host and device that fails costs what is under way; a device that is gone, a role.

Roles are threads on emulated cards over tcp, so that a test decides which copy of whose fails.
"""

import threading
import time

import numpy as np
import pytest

from step3_hetero import SamplingParams, load
from step3_hetero.afd import leaving, link, local
from step3_hetero.afd.drain import Drain
from step3_hetero.afd.elsewhere import Threads
from step3_hetero.afd.landing import Landed
from step3_hetero.afd.leaving import DeviceLost, Leaving, check_copies
from step3_hetero.afd.link import SEND_DEADLINE_S
from step3_hetero.afd.ranks import RANKS_S
from step3_hetero.backend import Done, Event
from step3_hetero.emulate.device import EmulatedDevice
from step3_hetero.errors import RoleLost, Step3HeteroError, TransportTimeout
from step3_hetero.registry import get_backend
from step3_hetero.runtime.resolving import read_config
from step3_hetero.transport.base import CopyFailed
from step3_hetero.transport.tcp import STALL_S, TcpChannel

pytest.importorskip("torch")

CARDS = {"a": "h800", "f": "h20"}
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=1)
PATIENT_S = 60.0


class Never(Event):
    """A copy that does not end."""

    def wait(self, deadline_s=None):
        raise TransportTimeout("the copy did not end")


class Slow(Event):
    """A copy that ends late, within what it may take."""

    def __init__(self, event, seconds):
        self._event, self._until = event, time.monotonic() + seconds

    def wait(self, deadline_s=None):
        time.sleep(max(0.0, self._until - time.monotonic()))
        self._event.wait(deadline_s)


class Standing(threading.Thread):
    """A role that stands, in a thread."""

    def __init__(self, config, name):
        super().__init__(daemon=True)
        self._config, self._name = config, name
        self.said, self.error, self._where = [], None, ""
        self._listens, self.drain = threading.Event(), Drain(1.0)
        self.start()
        assert self._listens.wait(PATIENT_S)
        self.address = self._where

    def run(self):
        try:
            local.serve_role(self._config, self._name, 0, "", self._tell, self.drain, stands=True)
        except SystemExit:
            pass
        except Step3HeteroError as error:
            self.error = error

    def _tell(self, **facts):
        if "said" in facts:
            self.said.append(facts["said"])
        if "address" in facts:
            self._where = facts["address"]
            self._listens.set()


@pytest.fixture
def standing(write_config, monkeypatch):
    """Return a config with one standing role, and that role: its tensors go in small pieces."""
    monkeypatch.setattr(leaving, "PIECE_BYTES", 256)
    monkeypatch.setattr(local, "_own_launcher", in_threads)
    waits_for_roles(monkeypatch, PATIENT_S)
    started = []

    def start(name, deadline_s=5.0):
        emulated = {f"roles__{r}__emulate": {"card": card} for r, card in CARDS.items()}
        keys = {**emulated, "transport__kind": "tcp", "transport__deadline_s": deadline_s}
        role = Standing(read_config(write_config("role.yaml", **keys), {}), name)
        started.append(role)
        return write_config("front.yaml", **keys, **{f"roles__{name}__hosts": [role.address]}), role

    yield start
    for role in started:
        role.drain.ask()
        role.join(PATIENT_S)


def waits_for_roles(monkeypatch, seconds):
    for module in ("elsewhere", "front", "seats"):
        monkeypatch.setattr(f"step3_hetero.afd.{module}.START_S", seconds)


def in_threads(resolved, *_):
    def serve(member, tell, drain):
        local.serve_role(resolved.config, member.role, member.number, "", tell, drain)

    return Threads(serve)


def answers(config):
    with load(config) as engine:
        got = engine.generate([21, 22, 23, 24], PARAMS)
    return got.token_ids, [p.chosen for p in got.logprobs]


def changes_once(monkeypatch, name, method, changed):
    """Change the end of the third copy of a card's out of, or into, its memory; return whose."""
    failed, calls, copy = [], [], getattr(EmulatedDevice, method)

    def copied(self, *arrays):
        event = copy(self, *arrays)
        if self.card.name != CARDS[name]:
            return event
        calls.append(1)
        if len(calls) != 3:
            return event
        failed.append(self.info.name)
        return changed(event)

    monkeypatch.setattr(EmulatedDevice, method, copied)
    return failed


@pytest.mark.parametrize("method", ["copy_out", "copy_in"])
@pytest.mark.parametrize("name", ["a", "f"])
def test_a_copy_that_fails_costs_what_is_under_way_and_not_the_role(
    standing, monkeypatch, name, method
):
    config, role = standing(name)
    want = answers(config)
    failed = changes_once(monkeypatch, name, method, lambda event: Never())
    assert answers(config) == want
    assert len(failed) == 1
    assert any("is served no longer" in said and "did not copy" in said for said in role.said)
    assert answers(config) == want
    assert role.is_alive() and role.error is None


@pytest.mark.parametrize("name", ["a", "f"])
def test_a_piece_that_comes_late_within_its_frame_costs_a_link_and_no_role(
    standing, monkeypatch, name
):
    monkeypatch.setattr(link, "PIECE_BYTES", 256)  # a frame begins with its first piece
    config, role = standing(name, 1.0)
    want, receive, stalled = answers(config), TcpChannel.receive, []

    def received(self, deadline_s):
        try:
            return receive(self, deadline_s)
        except RoleLost as lost:
            stalled.extend(["stalled within a frame"] * ("stalled" in str(lost)))
            raise

    monkeypatch.setattr(TcpChannel, "receive", received)
    late = changes_once(monkeypatch, name, "copy_out", lambda event: Slow(event, 2 * STALL_S))
    assert answers(config) == want
    assert len(late) == len(stalled) == 1 and role.said == []
    assert role.is_alive() and role.error is None


def test_a_role_whose_device_is_gone_says_so_and_ends(standing, monkeypatch):
    config, role = standing("f")
    answers(config)
    copy = EmulatedDevice.copy_out

    def copied(self, *arrays):
        return Never() if self.card.name == CARDS["f"] else copy(self, *arrays)

    waits_for_roles(monkeypatch, 2.0)
    monkeypatch.setattr(EmulatedDevice, "copy_out", copied)
    with pytest.raises((RoleLost, TransportTimeout), match=r"f:0|no micro-batch"):
        answers(config)
    role.join(PATIENT_S)
    assert isinstance(role.error, DeviceLost)
    assert str(role.error).startswith("h20 emulated on cpu:0 is gone, it copies nothing any more")


def device():
    return get_backend("reference").open(0)


def test_a_device_that_copies_is_there():
    check_copies(device())


@pytest.mark.parametrize("method", ["copy_in", "copy_out"])
def test_a_device_that_copies_nothing_or_something_else_is_gone(monkeypatch, method):
    gone = device()
    for broken, why in ((Never(), "copies nothing any more"), (Done(), "not what it was given")):
        monkeypatch.setattr(gone, method, lambda *_, event=broken: event)
        with pytest.raises(DeviceLost, match=why):
            check_copies(gone)


def test_a_copy_that_ends_late_is_not_sent_after_all():
    class Late(Event):
        waited = 0

        def wait(self, deadline_s=None):
            self.waited += 1
            if self.waited == 1:
                raise TransportTimeout("late")

    sent = Leaving(device())
    sent._started.append((0, Late()))
    for _ in range(2):
        with pytest.raises(CopyFailed, match="reference:0 did not copy what is to be sent: late"):
            sent.ready(1)


def test_what_has_come_and_is_not_copied_is_a_failed_copy():
    landed = Landed(device(), np.zeros(1), [Never()])
    with pytest.raises(CopyFailed, match="reference:0 did not copy what has come"):
        landed.there()


def test_who_sends_has_more_patience_than_a_peer_that_waits_for_a_copy_or_for_ranks():
    assert max(leaving.COPY_S, RANKS_S) + 10 < SEND_DEADLINE_S
