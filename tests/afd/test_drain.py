"""When a role is asked to end: at once where it is idle, whenever the signal comes."""

import signal

import pytest

from step3_hetero.afd.drain import Drain


@pytest.fixture
def drain():
    before = signal.getsignal(signal.SIGTERM)
    made = Drain(0.0)
    made.on_sigterm()
    yield made
    signal.signal(signal.SIGTERM, before)


def test_a_signal_ends_an_idle_role_and_only_asks_a_busy_one(drain):
    signal.raise_signal(signal.SIGTERM)
    assert drain.asked
    with pytest.raises(SystemExit), drain.idle():
        raise AssertionError("it was asked to end before")
    drain.asked = False
    with pytest.raises(SystemExit), drain.idle():
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_that_comes_just_as_a_role_becomes_idle_is_not_lost(drain, monkeypatch):
    def check():
        Drain.check(drain)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(drain, "check", check)
    with pytest.raises(SystemExit), drain.idle():
        raise AssertionError("idle, and not to be ended")
