"""Codes of a cache that rounding may turn: allowed where it may, and nowhere else."""

import numpy as np
import pytest
from meta.defects_formats import cache
from meta.twin import failing, quick_trials

from step3_hetero.backends.reference.attention import ReferenceCache
from step3_hetero.conformance.codes import turn_codes
from step3_hetero.conformance.draws import filling
from step3_hetero.conformance.trial import reference
from step3_hetero.specs import CacheSpec

STAGES = [t for t in quick_trials("attention_stage") if t.kv]


def stored_codes(error):
    """Return the codes of a row whose quotients are 127, 3.49, 3.6 and -8.51, turned."""
    device, blocks = reference(), filling(1)
    k = np.zeros((128, 1, 4), np.float32)
    k[5, 0] = [127, 3.49, 3.6, -8.51]
    turn_codes(device, [(k.astype(float), k.astype(float))], [(k + error, k)])
    held = device.open_cache(CacheSpec(1, 4, 1, "int8"))
    held.write(k, k, device.batch(blocks))
    return held.k[5, 0].tolist(), held.v[5, 0].tolist()


def test_code_within_rounding_of_a_tie_is_turned_and_no_other():
    turned, exact = stored_codes(np.float32(0.01))
    assert turned == [127, 4, 4, -8]
    assert exact == [127, 3, 4, -9]


def test_code_farther_than_rounding_from_a_tie_stays():
    assert stored_codes(np.float32(0.001))[0] == [127, 3, 4, -9]


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
