"""torch's own ops that the backend uses are those that tier 2 looks up."""

import json
from pathlib import Path

import torch

USED = json.loads((Path(__file__).with_name("device") / "used.json").read_text())


def test_ops_in_use_are_recorded_and_have_kernels(device):
    schemas = json.loads((Path(__file__).with_name("device") / "schemas.json").read_text())
    seen = torch.ops.npu_stand_in.operators_used()
    assert set(seen) - {"special_bessel_j0"} <= set(USED)
    assert {name.partition(".")[0] for name in USED} <= set(schemas["native"])
    assert len(USED) > 30
