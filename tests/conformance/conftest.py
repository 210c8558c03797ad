"""The device on trial, and a vendor whose library crashes, hangs and lies on request."""

import os
import subprocess
import sys

import pytest

from step3_hetero.registry import get_backend

VENDOR = """
import os, signal, time
from step3_hetero.backend import Backend, Device
from step3_hetero.registry import get_backend


# A driver that has lost its device: nothing works until the process ends.
broken = False


class LostError(Exception):
    # It cannot be brought to another process: its arguments are not what it is made from.
    def __init__(self, code, place):
        super().__init__(f"device lost: {code} at {place}")


def works(kernel):
    def run(*arrays, **parameters):
        if broken:
            raise RuntimeError("the device is lost")
        return kernel(*arrays, **parameters)
    return run


class Bad(Backend):
    name = "bad"
    borrows = ("reference",)

    def __init__(self):
        self.inner = get_backend("reference")

    def devices(self):
        return self.inner.devices()

    def why_unavailable(self):
        return os.environ.get("BAD_WHY")

    def open(self, index, options={}):
        if os.environ.get("BAD_OPEN"):
            os.abort()
        device = self.inner.open(index)
        kernels = dict(device.kernels)
        rope = kernels["rope"]
        def dies(*_, **__):
            os.kill(os.getpid(), signal.SIGSEGV)
        def hangs(*_, **__):
            if os.environ.get("BAD_MARK"):
                time.sleep(2)  # who asked has taken in what came before
                open(os.environ["BAD_MARK"], "w").close()
            time.sleep(600)
        def wrong(x, positions, *, theta):
            return rope(x, positions, theta=theta) * 1.5
        def raises(*_, **__):
            global broken
            broken = True
            raise LostError(700, "quick_gelu")
        kernels |= {"add": dies, "swiglu": hangs, "rope": wrong, "quick_gelu": raises}
        device.kernels = {n: works(k) for n, k in kernels.items()}
        plain = device.batch
        device.batch = lambda meta: (device.from_host(meta.slots), plain(meta))[1]
        return device

    def supports(self, info, spec):
        if spec.op == "resize":
            return "no kernel for resize"
        if spec.op == "layer_norm":
            raise KeyError("rows")
        return self.inner.supports(info, spec)

    def reference_info(self, card):
        return self.inner.reference_info(card)
"""


@pytest.fixture(scope="session")
def cpu():
    backend = get_backend("cpu")
    if backend.why_unavailable():
        pytest.skip(backend.why_unavailable())
    return backend, backend.open(0)


@pytest.fixture
def bad_vendor(tmp_path):
    """Install the vendor into a folder of its own and return that folder."""
    package = tmp_path / "site" / "bad_vendor"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(VENDOR)
    info = package.parent / "bad_vendor-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bad-vendor\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[step3_hetero.backends]\nbad = bad_vendor:Bad\n")
    return package


@pytest.fixture
def command(bad_vendor, tmp_path):
    """Run ``step3-hetero`` with the vendor installed."""

    def run(*arguments, **environment):
        return subprocess.run(
            [sys.executable, "-m", "step3_hetero.cli", *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(bad_vendor.parent), "OMP_NUM_THREADS": "1",
                 **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )  # fmt: skip

    return run
