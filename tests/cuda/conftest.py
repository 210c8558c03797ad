"""The cuda backend in Triton's interpreter: its code path without a card."""

import numpy as np
import pytest

from step3_hetero.registry import get_backend

pytest.importorskip("triton", reason="triton is not installed; make setup brings it")


@pytest.fixture(scope="session")
def cuda():
    """Return the backend and an interpreted sm_90."""
    backend = get_backend("cuda")
    return backend, backend.open(0, {"interpret": True})


@pytest.fixture(scope="session")
def device(cuda):
    return cuda[1]


@pytest.fixture(scope="session")
def a800():
    """Return an interpreted sm_80: no FP8 arithmetic."""
    return get_backend("cuda").open(0, {"interpret": True, "arch": 80})


@pytest.fixture(scope="session")
def reference():
    return get_backend("reference").open(0)


@pytest.fixture
def rng():
    return np.random.default_rng(7)
