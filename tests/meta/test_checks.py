"""Every check earns its place: without it alone, a defect that it catches would pass."""

import itertools

import numpy as np
import pytest

from meta.defects_contract import reused
from meta.defects_products import ties_to_the_higher
from meta.defects_stages import (
    STAGES,
    Elsewhere,
    PaddingCached,
    PositionsOfTheFirstBatch,
    Tiles,
    by_kind,
    stage,
    through_the_host,
)
from meta.twin import Defect, failing, kernel, quick_trials, wrapped
from step3_hetero.backends.reference.attention import ReferenceCache
from step3_hetero.backends.reference.device import KERNELS
from step3_hetero.composed import Attention, Ffn
from step3_hetero.conformance.checks import CHECKS
from step3_hetero.conformance.tolerance import ROUNDOFF


def nan_as_zero(out):
    return np.where(np.isnan(out.astype(np.float32)), out.dtype.type(0), out)


def lifted(out):
    """Add what underflows: rows that are zero in the end are not quite."""
    zero = (out == 0).all(-1, keepdims=True)
    return np.where(zero, np.asarray(1e-30, out.dtype), out)


def a_little_too_large(out):
    """Scale by one rounding and a half: no element is beyond its bound, the rows are."""
    return (out.astype(np.float64) * (1 + 1.5 * ROUNDOFF[out.dtype.name])).astype(out.dtype)


def one_coarse_element(out):
    """Put one element of 18,432 off by 60 roundings of its row's size: the row hides it."""
    if out.shape[-1:] == (18_432,) and len(out) > 3:
        size = np.sqrt(np.mean(out[3].astype(np.float64) ** 2))
        out[3, 4_321] += out.dtype.type(60 * ROUNDOFF[out.dtype.name] * size)
    return out


def clears_its_input(x):
    out = KERNELS["quick_gelu"](x)
    x[...] = 0
    return out


def clears_the_row_behind(x):
    out = KERNELS["quick_gelu"](x)
    if x.base is not None:
        end = (x.ctypes.data - x.base.ctypes.data) // x.strides[0] + len(x)
        x.base[end : end + 1] = 0
    return out


def clears_the_rest_of_the_block(q, cache: ReferenceCache, batch, *, scale):
    """Clear the slot behind each context, where nothing reads yet."""
    out = KERNELS["attention"](q, cache, batch, scale=scale)
    meta = batch.meta
    for table, length in zip(meta.block_tables, meta.context_lens, strict=True):
        if length % 128:
            cache.k[table[length // 128] * 128 + length % 128] = 0
    return out


class OwnCopies(Attention):
    """Hands contiguous operands to kernels that know no others."""

    def op(self, name, *arrays, **parameters):
        fresh = (a.copy() if isinstance(a, np.ndarray) else a for a in arrays)
        return super().op(name, *fresh, **parameters)


def blind_to_strides(device):
    """Let a norm read its operand as if it were contiguous, and the fused stage know of it."""

    def rms_norm(x, weight, *, eps):
        if not x.flags.c_contiguous:
            start = x.base.reshape(-1)[: x.size]
            x = start.reshape(x.shape)
        return KERNELS["rms_norm"](x, weight, eps=eps)

    stage("attention_stage", "", OwnCopies).plant(device)
    device.kernels["rms_norm"] = rms_norm


def in_turns():
    """Return a kernel that computes in float64 every other time."""
    wider = itertools.cycle((False, True))

    def swiglu(gate_up):
        if not next(wider):
            return KERNELS["swiglu"](gate_up)
        return KERNELS["swiglu"](gate_up.astype(np.float64)).astype(gate_up.dtype)

    return swiglu


CAUGHT_BY_ONE = {
    "shape": wrapped("layer_norm", "float32 for all", lambda out: out.astype(np.float32)),
    "non-finite": wrapped("rms_norm", "NaN as zero", nan_as_zero),
    "equal": kernel("route", "ties to the higher expert", ties_to_the_higher),
    "rows": wrapped("layer_norm", "a little too large", a_little_too_large),
    "elements": wrapped("swiglu", "one element coarse", one_coarse_element),
    "zeros": wrapped("rms_norm", "zero rows lifted", lifted),
    "aliasing": kernel("quick_gelu", "one buffer for all", reused("quick_gelu")),
    "determinism": kernel("swiglu", "in turns", in_turns()),
    "inputs": kernel("quick_gelu", "input cleared", clears_its_input),
    "sentinels": kernel("quick_gelu", "row behind cleared", clears_the_row_behind),
    "cache": kernel("attention", "next slot cleared", clears_the_rest_of_the_block),
    "ownership": kernel("quick_gelu", "elsewhere", lambda x: Elsewhere(KERNELS["quick_gelu"](x))),
    "calls": Defect("swiglu", "through the host", through_the_host),
    "composition": Defect("attention_stage", "kernels blind to strides", blind_to_strides),
    "padding": stage("attention_stage", "padding cached", PaddingCached),
    "reuse": stage("attention_stage", "positions of the first batch", PositionsOfTheFirstBatch),
    "batch-invariance": by_kind("ffn", "deaf to batch invariance", Tiles, Ffn),
}
"""For each check a defect that it alone sees."""


def test_every_check_has_its_defect():
    assert set(CAUGHT_BY_ONE) == set(CHECKS)


def found_by(defect, checks=CHECKS):
    results = failing(defect, quick_trials(defect.op), checks)
    return {finding.check for r in results for finding in r.findings}


def without(names):
    return {name: check for name, check in CHECKS.items() if name not in names}


@pytest.mark.parametrize("check", CAUGHT_BY_ONE)
def test_defect_passes_when_its_check_alone_is_removed(check):
    defect = CAUGHT_BY_ONE[check]
    assert found_by(defect) == {check}
    assert found_by(defect, without({check})) == set()


@pytest.mark.parametrize(
    ("what", "checks"),
    [
        ("attention_stage: float64 with padding", {"padding"}),
        ("ffn_stage: the caller's buffers filled from the host", {"calls"}),
    ],
)
def test_every_run_is_held_like_the_plain_one(what, checks):
    (defect,) = (d for d in STAGES if str(d) == what)
    assert found_by(defect) == checks
