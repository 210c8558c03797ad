"""`roles.X.weights: int8`: what it costs, what is said of it, who takes it, and who checks it."""

from pathlib import Path

import pytest

from step3_hetero.api import load
from step3_hetero.config import Config
from step3_hetero.errors import UnsupportedOp
from step3_hetero.model.checkpoint import Checkpoint
from step3_hetero.model.config import ModelConfig
from step3_hetero.registry import get_backend
from step3_hetero.runtime.loader import stage_weights
from step3_hetero.runtime.resolving import resolve
from step3_hetero.specs import EmbedSpec

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny-step3-digits"


def config(model=TINY, backend="cpu", **runtime):
    rest = ["embed", "vision", "attention", "head", "ffn[0,2-3]"]
    roles = {
        "a": {"stages": rest, "backend": "cpu"},
        "f": {"stages": ["ffn[1]"], "backend": backend, "weights": "int8"},
    }
    held = {"dtype": "fp32", **runtime}
    return {"version": 1, "model": str(model), "roles": roles, "runtime": held}


def resolved(given):
    return resolve(Config.from_dict(given, TINY))


def test_embedding_stays_in_the_dtype_of_the_activations():
    assert EmbedSpec("bfloat16", 8, 4).ops("int8")[0].weight_format == "auto"


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_check_counts_the_bytes_that_a_device_holds(backend):
    found = resolved(config(backend=backend))
    source = Checkpoint.open(TINY, ModelConfig.read(TINY))
    node = found.graph.by_name["ffn[1]"]
    weights = stage_weights(get_backend(backend).open(0), node, source, "int8")
    role = found.placement.roles["f"]
    assert role.weight_bytes == role.requantised.nbytes == sum(w.nbytes for w in weights.values())
    assert all(w.method.startswith("int8 per output row from ") for w in weights.values())


def test_report_names_what_is_requantised_and_nothing_else():
    a, f = resolved(config()).placement.to_json()["roles"]
    assert a["requantised"] is None
    made = f["requantised"]
    assert (made["to"], made["tensors"]) == ("int8", 6)  # experts and shared: gate, up, down
    assert made["weights"] < made["bytes"] == f["weight_bytes"]


def test_backend_without_the_format_refuses_before_weights_are_read(monkeypatch):
    read = []
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, name, **more: read.append(name))
    with pytest.raises(UnsupportedOp, match=r"roles\.f: .* cannot run ffn\[1\]: .*int8"):
        load(config(backend="ascend"))  # in float32: it takes int8 beside bfloat16
    assert not read


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_shadow_check_finds_nothing_beyond_rounding(backend, shadow_report):
    given = config(backend=backend, shadow_backend="reference", shadow_sample=1.0)
    report = shadow_report(given)
    assert report["stages"]["ffn[1]"]["checks"] >= 3
    assert report["excesses"] == 0
