"""Golden vectors: recorded here, verified there, refused when a byte has changed."""

import shutil

import numpy as np
import pytest

from step3_hetero.conformance import vectors
from step3_hetero.conformance.suite import select
from step3_hetero.errors import ConfigError
from step3_hetero.registry import get_backend

CHOSEN = (
    "tokens=7,n=96",
    "route experts=48,top_k=3",
    "ffn_stage odd,layer=0",
    "kv_cache tokens=200",
    "attention[ padding=4",
)


@pytest.fixture(scope="module")
def recorded(cpu, tmp_path_factory):
    path = tmp_path_factory.mktemp("vectors") / "v.safetensors"
    vectors.write(path, *cpu, dict(vectors.record(*cpu, select(CHOSEN))))
    return path


def other_device():
    """The reference, as a machine of its own that never met the one that recorded."""
    backend = get_backend("reference")
    return backend, backend.open(0)


def test_what_one_backend_recorded_another_verifies(recorded):
    manifest, cases = vectors.read(recorded)
    results = list(vectors.verify(*other_device(), cases))
    assert manifest["backend"] == "cpu"
    assert len(results) == len(cases) > 10
    assert {r.status for r in results} == {"passed"}


def test_a_wrong_kernel_fails_verification_without_asking_the_reference(recorded, monkeypatch):
    def judge(trial):
        raise AssertionError(f"the reference was asked about {trial}")

    monkeypatch.setattr("step3_hetero.conformance.exam.expected_of", judge)
    backend, device = other_device()
    right = device.kernels["rms_norm"]
    device.kernels = {**device.kernels, "rms_norm": lambda x, w, eps: right(x, w, eps=100 * eps)}
    _, cases = vectors.read(recorded)
    failed = {r.id.split("[")[0] for r in vectors.verify(backend, device, cases)
              if r.status == "failed"}  # fmt: skip
    assert failed == {"rms_norm"}


def test_inputs_that_are_drawn_otherwise_here_are_named(recorded):
    _, cases = vectors.read(recorded)
    name = next(iter(cases))
    changed = vectors.Recorded(cases[name].expected, cases[name].got, {"x": "0" * 64})
    (result,) = vectors.verify(*other_device(), {name: changed})
    assert result.findings[0].check == "inputs"


def test_any_flipped_byte_and_any_cut_is_refused(recorded, tmp_path):
    whole = recorded.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    rng = np.random.default_rng(0)
    places = [0, 3, 7, 8, 8 + header - 1, 8 + header, len(whole) - 1]
    places += rng.integers(8, 8 + header, 12).tolist() + rng.integers(0, len(whole), 12).tolist()
    for place in places:
        for bit in (1, 128):
            broken = bytearray(whole)
            broken[place] ^= bit
            (tmp_path / "b.safetensors").write_bytes(broken)
            with pytest.raises(ConfigError, match=r"b\.safetensors"):
                vectors.read(tmp_path / "b.safetensors")
    for size in (0, 4, 100, 8 + header, len(whole) - 1):
        (tmp_path / "b.safetensors").write_bytes(whole[:size])
        with pytest.raises(ConfigError, match=r"b\.safetensors"):
            vectors.read(tmp_path / "b.safetensors")


def test_a_missing_or_foreign_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        vectors.read(tmp_path / "none.safetensors")
    shutil.copy("models/tiny-step3-digits/model-00001-of-00002.safetensors", tmp_path / "m")
    with pytest.raises(ConfigError, match="damaged or cut off"):
        vectors.read(tmp_path / "m")
