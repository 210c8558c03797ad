"""Checkpoints that a 910B cannot compute in: what becomes of them, and what is told of it."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from step3_hetero.api import load
from step3_hetero.config import Config
from step3_hetero.model.checkpoint import Checkpoint
from step3_hetero.model.config import ModelConfig
from step3_hetero.model.quantise import dequantise, quantise_blocks, quantise_checkpoint
from step3_hetero.registry import get_backend
from step3_hetero.runtime.loader import stage_weights
from step3_hetero.runtime.resolving import resolve
from step3_hetero.specs import HostTensor, OpSpec

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny-step3-digits"
SPEC = OpSpec("linear", "bfloat16", {}, {}, "auto")


def fp8(rng, *shape, name="w"):
    numbers, scale = quantise_blocks(rng.standard_normal(shape).astype(np.float32))
    return HostTensor(name, numbers, scale)


def relative(got, want):
    return float(((got - want) ** 2).sum() / (want**2).sum())


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def opened(**options):
    return get_backend("ascend").open(0, options)


def test_fp8_becomes_bfloat16_and_the_manifest_says_so(rng):
    device, tensor = opened(), fp8(rng, 1300, 200)  # more rows than one strip has
    weights = device.prepare("linear", {"w": tensor}, SPEC)
    want = dequantise(tensor, np.float32)
    got = device.to_host(weights.matrix)
    assert np.array_equal(got, want.astype(ml_dtypes.bfloat16))
    (entry,) = device.manifest
    assert entry.method == "bfloat16 from block float8_e4m3fn" == weights.method
    assert entry.error == pytest.approx(relative(got.astype(np.float32), want), rel=1e-3)


def test_manifest_names_source_and_digest_as_the_checkpoint_does(tmp_path):
    copy = quantise_checkpoint(TINY, tmp_path / "fp8")
    checkpoint = Checkpoint.open(copy, ModelConfig.read(copy))
    device, name = opened(), "model.layers.0.mlp.down_proj.weight"
    device.prepare("linear", {"w": checkpoint.tensor(name)}, SPEC)
    written = device.manifest[0].to_json()
    assert written["tensor"] == name and written["stored"] == "float8_e4m3fn"
    assert written["source_sha256"] == checkpoint.digest(name)
    assert 0 < written["squared_relative_error"] < 2**-16


def test_what_is_not_fp8_is_not_in_the_manifest(rng):
    device = opened()
    plain = HostTensor("w", rng.standard_normal((8, 8)).astype(np.float32))
    device.prepare("linear", {"w": plain}, SPEC)
    assert device.manifest == []


def test_all_of_a_models_fp8_tensors_are_listed(tmp_path, monkeypatch):
    device, backend = opened(), get_backend("ascend")
    monkeypatch.setattr(backend, "open", lambda *_: device)
    copy = quantise_checkpoint(TINY, tmp_path / "fp8")
    config = {"version": 1, "model": str(copy), "runtime": {"dtype": "bf16"},
              "roles": {"a": {"stages": ["embed", "vision", "attention", "head", "ffn"],
                              "backend": "ascend"}}}  # fmt: skip
    with load(config):
        listed = {entry.tensor.name.partition("[")[0] for entry in device.manifest}
    checkpoint = Checkpoint.open(copy, ModelConfig.read(copy))
    stored = {n for n in checkpoint.names() if checkpoint.tensor(n).scale_inv is not None}
    assert listed == stored != set()


def test_check_tells_what_becomes_of_an_fp8_checkpoint_on_ascend_alone(tmp_path):
    copy = quantise_checkpoint(TINY, tmp_path / "fp8")
    stages = {"a": ["embed", "vision", "attention", "head", "ffn[0,2-3]"], "f": ["ffn[1]"]}
    roles = {n: {"stages": s, "backend": b}
             for (n, s), b in zip(stages.items(), ("cpu", "ascend"), strict=True)}  # fmt: skip
    config = {"version": 1, "model": str(copy), "roles": roles, "runtime": {"dtype": "bf16"}}
    placement = resolve(Config.from_dict(config, copy)).placement
    a, f = (role["requantised"] for role in placement.to_json()["roles"])
    assert a is None  # cpu stores FP8
    assert (f["stored"], f["to"]) == ("block float8_e4m3fn", "bfloat16")
    device, source = opened(), Checkpoint.open(copy, ModelConfig.read(copy))
    stage_weights(device, placement.graph.by_name["ffn[1]"], source, "auto")
    assert {e.method for e in device.manifest} <= {
        "bfloat16 from block float8_e4m3fn", "bfloat16 from block float8_e4m3fn, transposed"
    }  # fmt: skip
    assert f["weights"] == sum(e.tensor.data.size for e in device.manifest) == f["bytes"] / 2


@pytest.mark.parametrize("stored", ["float8_e4m3fn", "bfloat16"])
def test_int8_products_err_by_what_int8_explains(stored, rng):
    device = opened()
    spec = OpSpec("linear", "bfloat16", {}, {}, "int8")
    tensor = fp8(rng, 130, 256)
    if stored == "bfloat16":
        tensor = HostTensor("w", tensor.data.astype(ml_dtypes.bfloat16))
    weights = device.prepare("linear", {"w": tensor}, spec)
    x = rng.standard_normal((5, 256)).astype(ml_dtypes.bfloat16)
    got = device.to_host(device.kernel("linear")(device.from_host(x), weights))
    want = x.astype(np.float32) @ dequantise(tensor, np.float32).T
    assert got.dtype == ml_dtypes.bfloat16
    assert 1e-6 < relative(got.astype(np.float32), want) < 4e-4
    assert weights.nbytes == 130 * 256 + 130 * 4
    assert "int8 per output row" in weights.method


def test_int8_experts_err_by_what_int8_explains(rng):
    device = opened()
    shapes = {"gate": (3, 48, 64), "up": (3, 48, 64), "down": (3, 64, 48)}
    tensors = {n: HostTensor(n, (rng.standard_normal(s) / 8).astype(ml_dtypes.bfloat16))
               for n, s in shapes.items()}  # fmt: skip
    u = rng.standard_normal((7, 64)).astype(ml_dtypes.bfloat16)
    weights = rng.random((7, 2)).astype(ml_dtypes.bfloat16)
    ids = np.array([[0, 1], [1, 2], [2, -1], [-1, -1], [0, 2], [1, 0], [2, 1]], np.int32)
    found = {}
    for form in ("auto", "int8"):
        stack = device.prepare("experts", tensors, OpSpec("experts", "bfloat16", {}, {}, form))
        arrays = (device.from_host(a) for a in (u, weights, ids))
        found[form] = device.to_host(device.kernel("experts")(*arrays, stack)).astype(np.float32)
    assert np.all(found["int8"][3] == 0)
    assert 1e-6 < relative(found["int8"], found["auto"]) < 1e-3
