"""A package from outside plugs in: found by entry point, examined, and open about what it lacks."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from step3_hetero.conformance.cases import trials
from step3_hetero.conformance.certificate import Certificate
from step3_hetero.conformance.exam import examine
from step3_hetero.conformance.gaps import known_gaps
from step3_hetero.registry import backend_names, get_backend

SOURCE = Path(__file__).resolve().parents[1] / "examples" / "third_vendor"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Install a copy of the package, without network, into a folder of its own."""
    folder = tmp_path_factory.mktemp("third_vendor")
    shutil.copytree(SOURCE, folder / "source", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
         "--no-build-isolation", "--disable-pip-version-check", "--root-user-action=ignore",
         "--target", folder / "site", folder / "source"],
        text=True, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


@pytest.fixture
def backend(installed, monkeypatch):
    """Return the backend as the registry finds it; afterwards nothing of it is left."""
    monkeypatch.syspath_prepend(str(installed))
    get_backend.cache_clear()
    yield get_backend("third_vendor")
    get_backend.cache_clear()
    for name in [n for n in sys.modules if n.partition(".")[0] == "third_vendor"]:
        del sys.modules[name]


def examined(backend, *ops):
    chosen = [t for t in trials().values() if t.op in ops and not t.full]
    assert {t.op for t in chosen} == set(ops)
    device = backend.open(0)
    return [examine(backend, device, t) for t in chosen]


def test_command_lists_it_with_its_version_and_device(installed):
    done = subprocess.run(
        [sys.executable, "-m", "step3_hetero.cli", "backends", "--json"],
        env={**os.environ, "PYTHONPATH": str(installed)},
        text=True, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (listed,) = (b for b in json.loads(done.stdout) if b["name"] == "third_vendor")
    assert (listed["version"], listed["why"]) == ("0.1.0", None)
    assert [(d["name"], d["tier"]) for d in listed["devices"]] == [
        ("third_vendor:0", "host stand-in")
    ]


def test_its_own_kernel_and_those_it_borrows_pass(backend):
    results = examined(backend, "rms_norm", "rope", "route", "experts", "ffn_stage")
    assert not [(r.id, r.findings) for r in results if r.status != "passed"]


def test_its_own_kernel_is_its_own(backend):
    device = backend.open(0)
    lent = get_backend("reference").open(0).kernels
    own = {op for op, kernel in device.kernels.items() if kernel is not lent[op]}
    assert own == {"rms_norm"}
    assert lent.keys() - device.kernels.keys() == {"resize"}


def test_op_that_it_leaves_out_is_unclaimed_with_the_reason(backend):
    results = examined(backend, "resize", "vision_stage")
    assert {r.status for r in results} == {"unclaimed"}
    assert all("no resize yet" in r.reason for r in results)


def test_borrowing_that_is_not_declared_fails(backend, monkeypatch):
    monkeypatch.setattr(type(backend), "borrows", ())
    borrowed, own = examined(backend, "swiglu"), examined(backend, "rms_norm")
    assert {f.check for r in borrowed for f in r.findings} == {"calls"}
    assert {r.status for r in borrowed} == {"failed"}
    assert {r.status for r in own} == {"passed"}


def test_it_knows_of_no_gap(backend, installed):
    assert (installed / "third_vendor" / "known_gaps.txt").is_file()
    assert known_gaps(backend) == {}


def test_it_is_gone_when_it_is_not_installed():
    assert "third_vendor" not in backend_names()


def test_command_certifies_it(installed, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "step3_hetero.cli", "conformance", "run", "--backend",
         "third_vendor", "--json", tmp_path / "certificate.json"],
        env={**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"},
        text=True, capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = Certificate.read(tmp_path / "certificate.json")
    assert (found.passed, found.borrows, found.device.tier) == (
        True,
        ("reference",),
        "host stand-in",
    )
    unclaimed = {c.op for c in found.cases if c.status == "unclaimed"}
    assert unclaimed >= {"resize", "vision_stage"}
    assert set(found.counts) == {"passed", "unclaimed"}
