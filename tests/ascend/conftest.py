"""The backend on torch_npu's stand-in: set for the tests of this folder, gone afterwards."""

from pathlib import Path

import pytest

from step3_hetero.backends.ascend.driver import VARIABLE
from step3_hetero.registry import get_backend

STAND_IN = Path(__file__).with_name("device")


@pytest.fixture(scope="package", autouse=True)
def stand_in():
    """Name the stand-in to this process and to those it starts; return the variable's content."""
    torch = pytest.importorskip("torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(STAND_IN))
        reason = get_backend("ascend").why_unavailable()
        if reason and "compiler" in reason:
            pytest.skip(reason)
        assert reason is None
        assert torch.device("npu").type == "npu"
        yield str(STAND_IN)


@pytest.fixture(scope="package")
def backend(stand_in):
    """Return the backend."""
    return get_backend("ascend")


@pytest.fixture(scope="package")
def device(backend):
    """Return its only device."""
    return backend.open(0)
