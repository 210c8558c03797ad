"""A round of each kind of fault on one rack; ``make faults`` runs a hundred on all."""

import random
import secrets

import pytest
from afd.leaks import MARK, Before

from faults.rounds import FAULTS, RACKS, requests_of, run_round, standing, undisturbed

pytest.importorskip("torch")

pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.processes]

REQUESTS = 16
RACK = next(rack for rack in RACKS if "2A2F" in rack.name)


@pytest.fixture(scope="module")
def want():
    return undisturbed(requests_of(REQUESTS, 0))


@pytest.fixture(scope="module")
def scene():
    """Give one rack to all tests: what a fault leaves behind is the next one's to find."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MARK, mark := secrets.token_hex(8))
        before = Before(mark)
        with standing(RACK, patch) as found:
            yield found
        assert before.wait() == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_no_request_is_lost_or_altered(fault, scene, want):
    found = run_round(scene, fault, requests_of(REQUESTS, 0), want, random.Random(fault.name))
    assert found.struck, "the fault came too late to hit anything"
    assert found.right, found
