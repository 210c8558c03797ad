"""The bits of one process over every transport, for every count of micro-batches."""

import pytest
from afd.questions import APART, ONE, answers

pytest.importorskip("torch")
pytestmark = [
    pytest.mark.xdist_group("processes"),
    pytest.mark.processes,
    pytest.mark.usefixtures("no_leaks"),
]


@pytest.fixture(scope="module")
def together():
    return answers(**ONE)


@pytest.mark.parametrize("attention", [1, 2], ids=["1A1F", "2A1F"])
@pytest.mark.parametrize("microbatches", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["inproc", "shm", "tcp"])
def test_tokens_and_logprobs_are_those_of_one_process(together, kind, microbatches, attention):
    split = {
        "transport__kind": kind,
        "runtime__microbatches": microbatches,
        "roles__a__instances": attention,
    }
    assert answers(**APART, **split) == together
