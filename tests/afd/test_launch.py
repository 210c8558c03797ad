"""A role's process that cannot be ended is let go of after a bounded wait."""

import os
import subprocess
import threading
import time

import pytest

from step3_hetero.afd import launch
from step3_hetero.afd.launch import RoleProcess
from step3_hetero.afd.launcher import Reports

GRACE_S = 0.2


class Undying:
    """A child that a driver holds: no signal ends it, and whoever waits for it waits."""

    stdin = None

    def __init__(self):
        self.child = subprocess.Popen(["sleep", "600"])
        self.pid = self.child.pid
        self.waits = []

    def wait(self, timeout=None):
        self.waits.append(timeout)
        return self.child.wait(timeout)


@pytest.fixture
def role(monkeypatch):
    """Return a role in such a process, whose output goes on as well."""
    monkeypatch.setattr(launch, "GRACE_S", GRACE_S)
    popen, (reading, writing), never = Undying(), os.pipe(), threading.Event()
    lines = threading.Thread(target=never.wait, daemon=True)
    lines.start()
    one = RoleProcess("f:0", popen, Reports(reading), os.pidfd_open(popen.pid), lines)
    asked = []
    monkeypatch.setattr(
        launch.signal, "pidfd_send_signal", lambda fd, number: asked.append((fd, number))
    )
    one.asked = asked
    yield one
    never.set()
    popen.child.kill()
    popen.child.wait(10)
    os.close(writing)


@pytest.mark.parametrize("at_once", [False, True])
def test_a_child_that_does_not_die_of_sigkill_is_waited_for_and_no_longer(role, at_once):
    pidfd, start = role.pidfd, time.monotonic()
    ending = threading.Thread(target=role.end, kwargs={"at_once": at_once}, daemon=True)
    ending.start()
    ending.join(20)
    assert not ending.is_alive()
    assert time.monotonic() - start < 10
    assert role.asked == [(pidfd, launch.signal.SIGKILL)]
    assert role.popen.waits == [GRACE_S] * (1 if at_once else 2)
    assert not role.reports.is_open
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(pidfd)
