"""The quick suite on the stand-in: every op that is claimed keeps to what rounding explains."""

import json
import subprocess
import sys

import pytest

from step3_hetero.conformance.certificate import certify
from step3_hetero.conformance.exam import examine
from step3_hetero.conformance.suite import select
from step3_hetero.conformance.whole_model import ModelCase
from step3_hetero.ops import OPS

VISION = {"conv2d", "resize", "layer_norm", "quick_gelu", "self_attention"}


@pytest.mark.parametrize("trial", select(), ids=lambda trial: trial.id)
def test_ascend_keeps_to_what_rounding_explains(trial, backend, device):
    one_model = isinstance(trial, ModelCase)
    result = trial.examine(backend, device) if one_model else examine(backend, device, trial)
    said = "; ".join(f"{f.check}: {f.message}" for f in result.findings) or result.reason
    if "dtype=float8_e4m3fn" in trial.id and trial.op == "quantise":
        assert result.status == "unclaimed" and "no FP8" in result.reason
    elif "kv=float8_e4m3fn" in trial.id or "held=int8,float32" in trial.id:
        assert result.status == "unclaimed"
        assert "KV dtype" in result.reason or "int8 for linear and experts in" in result.reason
    else:
        assert result.status == "passed", said


def test_every_op_is_claimed_and_the_tier_is_named(backend, device):
    certificate = certify(backend, device.info, [], "selected")
    assert certificate.device.tier == "host stand-in"
    assert "stand-in" in certificate.device.description
    assert "stand-in" in certificate.library
    assert not certificate.missing
    assert VISION <= set(OPS) == set(device.kernels)


def test_certificate_of_the_command_names_the_tier(tmp_path, stand_in):
    file = tmp_path / "ascend.json"
    done = subprocess.run(
        [sys.executable, "-m", "step3_hetero.cli", "conformance", "run", "--backend", "ascend",
         "--only", "linear stored=float8_e4m3fn", "--json", str(file)],
        text=True, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tier: host stand-in" in done.stdout
    written = json.loads(file.read_text())
    assert written["device"]["tier"] == "host stand-in"
    held = {case["held"] for case in written["cases"] if case["status"] == "passed"}
    assert "bfloat16 from block float8_e4m3fn" in held
    assert all("from block float8_e4m3fn" in method for method in held)
