"""What happens to the link between attention and FFN happens to no request."""

import threading
import time
from pathlib import Path

import pytest

from faults.between import put_between
from faults.proxy import BACK, THERE
from step3_hetero import SamplingParams, load
from step3_hetero.runtime.request import Request

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "examples" / "digits.yaml"
PICTURES = sorted((ROOT / "examples" / "digits").glob("*.png"))
TOGETHER = {"roles__f__backend": "cpu", "runtime__batch_invariant": True}
APART = {
    **TOGETHER,
    "runtime__processes": "per-role",
    "transport__kind": "tcp",
    "transport__deadline_s": 8.0,  # a busy machine is no fault
}
STAGE_BYTES = 1500
"""A frame of a stage's tensors is larger than this, a sign of life far smaller."""

pytest.importorskip("torch")

pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.processes]


def answers(engine):
    asked = [
        Request("which digit is this ?", SamplingParams(max_tokens=8, logprobs=1), [picture])
        for picture in PICTURES[:4]
    ]
    return [(c.token_ids, [p.chosen for p in c.logprobs]) for c in engine.generate_all(asked)]


@pytest.fixture(scope="module")
def undisturbed():
    with load(DIGITS, **TOGETHER) as engine:
        return answers(engine)


def disturbed(monkeypatch, disturb):
    """Return the answers of an engine whose only link is disturbed at work, and its proxy."""
    proxies = put_between(monkeypatch, "f")
    with load(DIGITS, **APART) as engine:
        proxy = proxies["f:0"]
        trouble = threading.Thread(target=disturb, args=(proxy,))
        trouble.start()
        found = answers(engine)
        trouble.join()
    for made in proxies.values():
        made.close()
    return found, proxy


def when_busy(proxy):
    """Wait until stages' tensors cross the link."""
    until = time.monotonic() + 60
    while proxy.nbytes[THERE] < 20_000:
        assert time.monotonic() < until, "nothing crosses the link"
        time.sleep(0.005)


def test_a_link_that_is_cut_and_healed_changes_no_answer(monkeypatch, undisturbed):
    def cut(proxy):
        when_busy(proxy)
        proxy.cut()
        time.sleep(0.5)
        proxy.heal()

    found, proxy = disturbed(monkeypatch, cut)
    assert found == undisturbed
    assert proxy.connections >= 3  # the front's, the caller's, and the caller's again


@pytest.mark.parametrize("direction", [THERE, BACK])
def test_a_damaged_frame_is_sent_again(direction, monkeypatch, undisturbed):
    found, proxy = disturbed(
        monkeypatch, lambda proxy: proxy.corrupt_next(direction, least_bytes=STAGE_BYTES)
    )
    assert found == undisturbed
    assert proxy.flipped == 1
    assert proxy.connections == 2  # nobody had to connect again


def test_a_stall_shorter_than_the_deadline_is_waited_out(monkeypatch, undisturbed):
    def stall(proxy):
        when_busy(proxy)
        proxy.stall(0.8)

    found, proxy = disturbed(monkeypatch, stall)
    assert found == undisturbed
    assert proxy.connections == 2
