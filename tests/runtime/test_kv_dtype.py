"""`runtime.kv_dtype`: what a cache of fewer bytes costs, who takes it, and who checks it."""

from pathlib import Path

import pytest

from step3_hetero.config import Config
from step3_hetero.errors import UnsupportedOp
from step3_hetero.registry import get_backend
from step3_hetero.runtime.resolving import resolve
from step3_hetero.specs import CacheSpec, OpSpec

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny-step3-digits"
STEP3_LAYERS, HEAD_DIM = 61, 256


def config(model, kv_dtype, backend="cpu", **runtime):
    stages = ["embed", "vision", "attention", "head", "ffn"]
    held = {"dtype": "fp32", "kv_dtype": kv_dtype, **runtime}
    roles = {"a": {"stages": stages, "backend": backend}}
    return {"version": 1, "model": str(model), "roles": roles, "runtime": held}


@pytest.mark.parametrize(
    ("kv_dtype", "row_bytes"),
    [("auto", 4 * HEAD_DIM), ("bf16", 2 * HEAD_DIM), ("fp8", HEAD_DIM + 4), ("int8", HEAD_DIM + 4)],
)
def test_check_counts_codes_and_scales(kv_dtype, row_bytes):
    placed = resolve(Config.from_dict(config("step3", kv_dtype, kv_blocks=2), TINY)).placement
    assert placed.to_json()["roles"][0]["kv_bytes"] == 2 * 128 * 2 * row_bytes * STEP3_LAYERS


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_cache_holds_the_bytes_it_says(backend, dtype):
    cache = get_backend(backend).open(0).open_cache(CacheSpec(2, 24, 3, dtype))
    arrays = (cache.k, cache.v, cache.k_scale, cache.v_scale)
    assert sum(x.nbytes for x in arrays) == cache.nbytes == 3 * 128 * 2 * 2 * (24 + 4)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_other_cache_dtype_is_refused_by_name(backend):
    vendor = get_backend(backend)
    spec = OpSpec("attention", "bfloat16", kv_format="float16")
    said = vendor.supports(vendor.reference_info(None), spec)
    assert said is not None
    assert said.startswith("no KV cache in float16; allowed: ")
    assert "int8" in said


def test_backend_without_the_format_is_told_before_anything_is_opened():
    with pytest.raises(UnsupportedOp, match=r"cannot run attention.*e4m3fn.*set runtime\.kv_dtype"):
        resolve(Config.from_dict(config("step3", "fp8", "ascend", dtype="bf16"), TINY))


@pytest.mark.parametrize("kv_dtype", ["fp8", "int8"])
def test_shadow_check_finds_nothing_beyond_rounding(kv_dtype, shadow_report):
    given = config(TINY, kv_dtype, shadow_backend="reference", shadow_sample=1.0)
    report = shadow_report(given)
    assert report["checks"] > 30
    assert report["excesses"] == 0
