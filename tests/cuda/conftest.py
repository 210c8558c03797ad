"""The cuda backend in Triton's interpreter: its code path without a card."""

from importlib.util import find_spec

import numpy as np
import pytest

from step3_hetero.registry import get_backend

if find_spec("triton") is None:  # Triton is for Linux alone; make setup brings it there
    collect_ignore_glob = ["test_*.py"]


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
