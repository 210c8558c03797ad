"""Codes of a cache that rounding may turn: allowed where it may, and nowhere else."""

import numpy as np
import pytest
from meta.defects_formats import cache
from meta.twin import failing, quick_trials

from step3_hetero.backends.reference.attention import ReferenceCache
from step3_hetero.conformance.checks import CHECKS
from step3_hetero.conformance.codes import turn_codes
from step3_hetero.conformance.draws import filling
from step3_hetero.conformance.trial import reference
from step3_hetero.specs import CacheSpec

STAGES = [t for t in quick_trials("attention_stage") if t.kv]


def turned_cache(error, dtype="int8"):
    """Return a cache with a row whose quotients are 127, 3.49, 3.6 and -8.51, turned.

    ``error`` is what the reference's own keys err by; its values are exact.
    """
    device, blocks = reference(), filling(1)
    k = np.zeros((128, 1, 4), np.float32)
    k[5, 0] = [127, 3.49, 3.6, -8.51]
    turn_codes(device, [(k.astype(float), k.astype(float))], [(k + error, k)])
    held = device.open_cache(CacheSpec(1, 4, 1, dtype))
    held.write(k, k, device.batch(blocks))
    return held


def stored_codes(error):
    held = turned_cache(error)
    return held.k[5, 0].tolist(), held.v[5, 0].tolist()


def test_code_within_rounding_of_a_tie_is_turned_and_no_other():
    turned, exact = stored_codes(np.float32(0.01))
    assert turned == [127, 4, 4, -8]
    assert exact == [127, 3, 4, -9]


def test_code_farther_than_rounding_from_a_tie_stays():
    assert stored_codes(np.float32(0.001))[0] == [127, 3, 4, -9]


def test_scale_moves_as_far_as_rounding_carries_the_largest_element():
    held = turned_cache(np.float32(0.01))
    assert held.k_scale[5, 0] == pytest.approx((127 + 0.02) / 127, abs=1e-6)  # twice the error
    assert held.k_scale[0, 0] == 1  # a row of zeros has none


def test_scale_moves_by_its_own_rounding_where_the_reference_errs_by_nothing():
    assert 1 < turned_cache(np.float32(0)).v_scale[5, 0] <= 1 + 2.0**-22


def test_cache_without_scales_turns_its_numbers_alone():
    k = 1 + 2.0**-8 - 2.0**-20  # just under the tie between 1 and the next bfloat16
    device, blocks = reference(), filling(1)
    pair = np.full((128, 1, 4), k, np.float32)
    turn_codes(device, [(pair.astype(float),) * 2], [(pair + np.float32(1e-5), pair)])
    held = device.open_cache(CacheSpec(1, 4, 1, "bfloat16"))
    held.write(pair, pair, device.batch(blocks))
    assert float(held.k[5, 0, 0]) == 1 + 2.0**-7
    assert float(held.v[5, 0, 0]) == 1


class OneUlpMore(ReferenceCache):
    """Is given every row one float32 rounding larger: its codes are the same, its scales not."""

    def write(self, k, v, batch):
        if len(k) < len(self.k):  # the history before the run is every slot's
            k, v = (x * np.float32(1 + 2.0**-23) for x in (k, v))
        super().write(k, v, batch)


def test_last_bit_of_a_scale_is_no_finding():
    chosen = [t for t in STAGES if t.dtype == "float32"]
    assert len(chosen) >= 7
    honest = cache("one ulp more", OneUlpMore, op="attention_stage")
    assert not list(failing(honest, chosen, {"cache": CHECKS["cache"]}))


def unsteady(size):
    """Return the defect of a cache that quantises keys and values off by ``size``, relatively."""

    class Unsteady(ReferenceCache):
        def write(self, k, v, batch):
            rng = np.random.default_rng(0)
            k, v = (x * (1 + size * rng.choice([-1, 1], x.shape)).astype(np.float32)
                    for x in (k.astype(np.float32), v.astype(np.float32)))  # fmt: skip
            super().write(k, v, batch)

    return cache("unsteady", Unsteady, op="attention_stage")


@pytest.mark.parametrize("kv", ["int8", "float8_e4m3fn"])
def test_keys_off_by_more_than_rounding_fail_in_every_format(kv):
    chosen = [t for t in STAGES if t.kv == kv and t.dtype == "float32"]
    assert len(chosen) >= 3
    assert len(list(failing(unsteady(2.0**-10), chosen))) == len(chosen)
