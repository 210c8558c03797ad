"""What happens to the link between attention and FFN happens to no request."""

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
BUSY_BYTES = 20_000
"""Once so many have gone to the FFN, stages' tensors cross the link, and more are to come."""

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
    """Return the answers of an engine whose only link is disturbed at work, and its proxy.

    ``disturb`` is told the proxy before anything is asked, and gives it its orders.
    """
    proxies = put_between(monkeypatch, "f")
    with load(DIGITS, **APART) as engine:
        proxy = proxies["f:0"]
        disturb(proxy)
        found = answers(engine)
    for made in proxies.values():
        made.close()
    return found, proxy


def test_a_link_that_is_cut_and_healed_changes_no_answer(monkeypatch, undisturbed):
    def cut_and_heal(proxy):
        proxy.cut()
        time.sleep(0.5)
        proxy.heal()

    found, proxy = disturbed(
        monkeypatch, lambda proxy: proxy.when(BUSY_BYTES, lambda: cut_and_heal(proxy))
    )
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
    stalled = []

    def stall(proxy):
        proxy.stall(0.8)
        stalled.append(proxy)

    found, proxy = disturbed(
        monkeypatch, lambda proxy: proxy.when(BUSY_BYTES, lambda: stall(proxy))
    )
    assert found == undisturbed
    assert stalled == [proxy]
    assert proxy.connections == 2
