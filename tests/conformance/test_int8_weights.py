"""INT8 weights: one meaning for every backend that brings them, held by hand and by cases."""

import numpy as np
import pytest

from step3_hetero.backends.reference.linear import multiply
from step3_hetero.conformance.cases import trials
from step3_hetero.conformance.forms import OpTrial
from step3_hetero.conformance.tolerance import FACTOR
from step3_hetero.registry import get_backend
from step3_hetero.specs import HostTensor, OpSpec

CASES = [t for t in trials().values() if isinstance(t, OpTrial) and t.case.held == "int8"]


def held(backend, matrix):
    device = get_backend(backend).open(0)
    spec = OpSpec("linear", "float32", weight_format="int8")
    return device, device.prepare("linear", {"w": HostTensor("w", matrix)}, spec)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_product_is_that_of_the_codes_worked_by_hand(backend):
    matrix = np.array([[127, 63.5, -2.5], [0, 0, 0], [1, 0, -254]], np.float32)
    device, weights = held(backend, matrix)
    x = np.array([[2, -127, 0.5], [0, 0, 0]], np.float32)
    got = device.to_host(device.kernel("linear")(device.from_host(x), weights))
    # codes of x: 2, -127, 0 (a tie goes to the even one), scale 1
    # codes of the rows: 127, 64, -2 with scale 1; zeros; 0 (0.5, a tie), 0, -127 with scale 2
    assert got.tolist() == [[2 * 127 - 127 * 64, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_error_against_the_checkpoint_is_recorded(backend):
    rng = np.random.default_rng(0)
    weights = held(backend, rng.standard_normal((64, 256)).astype(np.float32))[1]
    assert weights.method.startswith("int8 per output row from float32, squared relative error ")
    assert 1e-5 < float(weights.method.rsplit(" ", 1)[1]) < 1e-4  # (3 / 127)² / 12, about
    assert weights.nbytes == 64 * 256 + 64 * 4


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_only_products_are_asked_for_in_int8(backend):
    vendor = get_backend(backend)
    info = vendor.reference_info(None)
    for op in ("linear", "experts"):
        assert vendor.supports(info, OpSpec(op, "bfloat16", weight_format="int8")) is None
    said = vendor.supports(info, OpSpec("embed", "bfloat16", weight_format="int8"))
    assert said is not None
    assert said.startswith("weights cannot be held as int8; allowed: ")


def quotients(trial, dtype):
    """Return the quotients of an experts case's inner rows for every chosen expert."""
    inputs = trial.inputs() if dtype == "float32" else trial.inputs().widened()
    device = get_backend("reference").open(0)
    stack = device.prepare(
        "experts", inputs.weights, OpSpec("experts", dtype, weight_format="int8")
    )
    found = []
    for u, ids in zip(inputs.arrays["u"], inputs.arrays["ids"], strict=True):
        for expert in ids[ids >= 0]:
            gate, up = (multiply(u[None], stack, n, expert)[0] for n in ("gate", "up"))
            inner = gate / (1 + np.exp(-gate)) * up
            found.append(inner / (np.abs(inner).max() / inner.dtype.type(127)))
    return np.array(found)


@pytest.mark.parametrize(
    "trial", [t for t in CASES if t.op == "experts" and t.dtype == "float32"], ids=str
)
def test_no_inner_code_of_a_float32_case_can_be_turned_by_rounding(trial):
    """In float32 one turned code is beyond any bound: all quotients lie off the ties.

    They lie farther than a kernel may err that errs twice as much as the reference's worst.
    """
    exact = quotients(trial, "float64")
    error = np.abs(quotients(trial, "float32") - exact).max(initial=0)
    off = np.abs(np.abs(exact) % 1 - 0.5)
    assert off.size == 0 or off.min() > np.sqrt(FACTOR) * error > 0
