"""Golden vectors: recorded here, verified there, refused when a byte has changed."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from step3_hetero.conformance import models, stages, vectors
from step3_hetero.conformance.last import Last
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
    vectors.write(path, *cpu, kept_of(vectors.record(*cpu, select(CHOSEN))))
    return path


def kept_of(recorded):
    return {case: kept for case, kept in recorded if not isinstance(kept, str)}


def verified(backend, device, cases):
    return [vectors.verify(backend, device, case, cases[case]) for case in cases]


def other_device():
    """The reference, as a machine of its own that never met the one that recorded."""
    backend = get_backend("reference")
    return backend, backend.open(0)


def test_what_one_backend_recorded_another_verifies(recorded):
    manifest, cases = vectors.read(recorded)
    results = verified(*other_device(), cases)
    assert manifest["backend"] == "cpu"
    assert len(results) == len(cases) > 10
    assert {r.status for r in results} == {"passed"}
    far = [vectors.apart(r, cases[r.id]) for r in results]
    assert max(far) < 1e-3
    assert any(x > 0 for x in far)


def test_a_wrong_kernel_fails_verification_without_asking_the_reference(recorded, monkeypatch):
    def judge(trial):
        raise AssertionError(f"the reference was asked about {trial}")

    monkeypatch.setattr("step3_hetero.conformance.exam.expected_of", judge)
    backend, device = other_device()
    right = device.kernels["rms_norm"]
    device.kernels = {**device.kernels, "rms_norm": lambda x, w, eps: right(x, w, eps=100 * eps)}
    _, cases = vectors.read(recorded)
    failed = {r.id.split("[")[0] for r in verified(backend, device, cases)
              if r.status == "failed"}  # fmt: skip
    assert failed == {"rms_norm"}


@pytest.mark.parametrize("name", ["rms_norm", "ffn_stage"])
def test_small_inputs_come_from_the_file_and_others_must_be_drawn_alike(recorded, name):
    _, cases = vectors.read(recorded)
    case = next(c for c in cases if c.startswith(name))
    one = cases[case]
    kept = next(iter(one.values))
    turned = {**one.values, kept: -one.values[kept]}
    result = vectors.verify(*other_device(), case, replace(one, values=turned))
    assert (result.status, result.findings[0].check) == ("failed", "inputs")
    assert kept in result.findings[0].message


def test_the_weights_behind_a_stage_and_the_batch_are_part_of_the_inputs(recorded, monkeypatch):
    _, cases = vectors.read(recorded)
    case = next(c for c in cases if c.startswith("ffn_stage"))
    assert any(name.startswith("batch ") for name in cases[case].inputs)
    drawn = models.Drawn._draw
    monkeypatch.setattr(stages, "DRAWN", Last())
    monkeypatch.setattr(
        models.Drawn, "_draw",
        lambda self, name: replace(t := drawn(self, name), data=t.data[::-1].copy()),
    )  # fmt: skip
    result = vectors.verify(*other_device(), case, cases[case])
    assert "stage model.layers.0.mlp" in result.findings[0].message


def test_a_file_of_no_cases_is_neither_written_nor_believed(cpu, recorded, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="no case to record"):
        vectors.write(tmp_path / "v", *cpu, {})
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(vectors, "trials", dict)
    with pytest.raises(ConfigError, match="is no case of this suite"):
        vectors.read(recorded)


def test_what_is_left_out_is_told(cpu):
    backend, _ = other_device()
    device = backend.open(0)
    device.kernels = {**device.kernels, "rope": lambda x, positions, theta: x * 2}
    said = dict(vectors.record(backend, device, select(["rope tokens=9"])))
    assert len(said) == 2
    assert all(why.startswith("failed: rows: ") for why in said.values())


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
    with pytest.raises(ConfigError, match="no vector file"):
        vectors.read(tmp_path / "m")
