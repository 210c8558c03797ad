"""Option ``nz``: which weights are held in the cube unit's format, and what is refused."""

import ml_dtypes
import numpy as np
import pytest
import torch

from step3_hetero.backends.ascend import driver, vendor
from step3_hetero.backends.ascend.limits import LimitExceeded
from step3_hetero.conformance.exam import examine
from step3_hetero.conformance.suite import select
from step3_hetero.specs import HostTensor, OpSpec

ND, NZ = 2, 29


@pytest.fixture
def fractal(backend, monkeypatch):
    """Return a device that holds matrices in fractals."""
    monkeypatch.setattr(driver.module().config, "allow_internal_format", False)
    return backend.open(0, {"nz": True})


def format_of(x):
    return torch.ops.npu.get_npu_format(x)


@pytest.mark.parametrize(
    ("dtype", "form", "want"),
    [("bfloat16", "auto", NZ), ("bfloat16", "int8", NZ), ("float32", "auto", ND)],
)
def test_matrices_of_the_cube_unit_are_fractal_and_float32_is_not(dtype, form, want, fractal):
    stored = np.ones((3, 4, 6), np.float32).astype(ml_dtypes.bfloat16)
    spec = OpSpec("linear", dtype, {}, {}, form)
    one = fractal.prepare("linear", {"w": HostTensor("w", stored[0])}, spec)
    stacks = {n: HostTensor(n, stored) for n in ("gate", "up")}
    stacks["down"] = HostTensor("down", stored.transpose(0, 2, 1).copy())
    many = fractal.prepare("experts", stacks, OpSpec("experts", dtype, {}, {}, form))
    assert {format_of(x) for x in (one.matrix, many.gate_up, many.down)} == {want}
    assert {w.method.endswith(", NZ") for w in (one, many)} == {want == NZ}


def test_without_the_option_nothing_is_fractal(device):
    table = HostTensor("w", np.ones((4, 6), ml_dtypes.bfloat16))
    weights = device.prepare("linear", {"w": table}, OpSpec("linear", "bfloat16"))
    assert format_of(weights.matrix) == ND and "NZ" not in weights.method


def test_products_of_fractal_weights_keep_to_what_rounding_explains(backend, fractal):
    chosen = select(["linear bfloat16"]) + select(["experts bfloat16"]) + select(["ffn_stage"])
    assert len(chosen) > 30
    for trial in chosen:
        result = examine(backend, fractal, trial)
        assert result.status in ("passed", "unclaimed"), result


def test_matrix_with_a_side_of_one_is_refused(fractal):
    row = {"w": HostTensor("w", np.ones((1, 6), ml_dtypes.bfloat16))}
    with pytest.raises(LimitExceeded, match="NZ matrix: 1 refused"):
        fractal.prepare("linear", row, OpSpec("linear", "bfloat16"))


def test_cast_without_effect_is_not_taken_for_one(monkeypatch):
    monkeypatch.setattr(driver.module().config, "allow_internal_format", False)
    with pytest.raises(LimitExceeded, match=r"NZ format: 2 refused.*allow_internal_format"):
        vendor.to_nz(torch.ones(4, 4, dtype=torch.bfloat16).to("npu"))
