"""What a certificate says, and the page made from certificates."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from step3_hetero.conformance import ops_page
from step3_hetero.conformance.certificate import (
    Certificate,
    certify,
    claimed_untested,
    schema_text,
)
from step3_hetero.conformance.digests import digests
from step3_hetero.conformance.exam import CaseResult, Finding
from step3_hetero.conformance.sketch import distance, sketch_of
from step3_hetero.conformance.text_layer import missing_text_ops
from step3_hetero.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = {
    "device": {"full"},
    "host stand-in": {"full"},
    "interpreted": {"quick"},  # real sizes would take the interpreter hours
}


def passing(case="add[x]", op="add", **fields):
    return CaseResult(case, op, "float32", "passed", **fields)


def test_published_schema_is_the_one_that_the_code_holds():
    published = ROOT / "docs" / "certificates" / "schema.json"
    assert published.read_text(encoding="utf-8") == schema_text()


def test_committed_certificates_pass_and_the_page_is_made_from_them():
    found = sorted((ROOT / "docs" / "certificates").glob("*.certificate.json"))
    certificates = [Certificate.read(path) for path in found]
    assert {c.backend for c in certificates} >= {"cpu"}
    assert all(c.passed and c.scope in ALLOWED[c.device.tier] for c in certificates)
    page = (ROOT / "docs" / "ops.md").read_text(encoding="utf-8")
    assert page == ops_page.page(certificates), "run: python -m step3_hetero.conformance.ops_page"


def test_page_says_how_weights_were_held_and_whose_reading_a_stand_in_is(cpu):
    backend, device = cpu
    results = [passing("linear[a]", "linear", held="bf16 from fp8"), passing(),
               passing("linear[b]", "linear", held="bf16 from fp8")]  # fmt: skip
    good = certify(backend, device.info, results, "full")
    assert good.held == {"bf16 from fp8": 2}
    page = ops_page.page([good])
    assert "- `cpu` holds weights as: bf16 from fp8 (2 cases)." in page
    assert "| op | cpu float32 | cpu bfloat16 |" in page
    away = good.device.model_copy(update={"tier": "host stand-in"})
    page = ops_page.page([good.model_copy(update={"device": away})])
    assert "| cpu float32 (our reading of the documents) |" in page


def test_one_failed_case_or_a_missing_op_fails_the_certificate(cpu):
    backend, device = cpu
    good = certify(backend, device.info, [passing()], "selected")
    failed = CaseResult("add[y]", "add", "float32", "failed", (Finding("rows", "far"),))
    assert good.passed
    assert not certify(backend, device.info, [passing(), failed], "selected").passed
    assert not good.model_copy(update={"text_layer": False}).passed


def test_a_backend_without_an_op_of_the_text_layer_is_told(cpu, monkeypatch):
    backend, device = cpu
    claims = backend.supports
    monkeypatch.setattr(
        type(backend), "supports",
        lambda self, info, spec: "none" if spec.op == "route" else claims(info, spec),
    )  # fmt: skip
    assert missing_text_ops(backend, device.info) == ["route"]


@pytest.mark.parametrize(
    ("refuses", "missing"),
    [
        (lambda spec: spec.dims.get("hidden", 0) > 4096, ["add", "embed", "experts"]),
        (lambda spec: (spec.op, spec.dtype) in {("rope", "float32"), ("swiglu", "bfloat16")},
         ["rope"]),
    ],
)  # fmt: skip
def test_a_text_layer_needs_real_sizes_and_one_dtype_for_all(cpu, monkeypatch, refuses, missing):
    backend, device = cpu
    monkeypatch.setattr(
        type(backend), "supports", lambda self, info, spec: "no" if refuses(spec) else None
    )
    assert missing_text_ops(backend, device.info) == missing


def test_what_is_claimed_and_never_tried_is_listed(cpu):
    backend, device = cpu
    listed = claimed_untested(backend, device.info, [passing()])
    assert "add float32" not in listed
    assert {"add bfloat16", "rope float32"} <= set(listed)
    assert not any("float64" in said for said in listed)


def test_an_infinite_figure_survives_writing(cpu, tmp_path):
    backend, device = cpu
    finding = Finding("runs", "x")
    result = CaseResult("add[y]", "add", "float32", "crashed", (finding,), float("inf"))
    certify(backend, device.info, [result], "selected").write(tmp_path / "c.json")
    assert json.loads((tmp_path / "c.json").read_text())["cases"][0]["worst"] == "inf"
    assert Certificate.read(tmp_path / "c.json").cases[0].worst == float("inf")


@pytest.mark.parametrize("content", ["", "[]", '{"version": 2}', '{"version": 1}'])
def test_what_is_no_certificate_is_refused(content, tmp_path):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(ConfigError, match=r"c\.json: no certificate"):
        Certificate.read(tmp_path / "c.json")


def test_a_certificate_names_the_libraries_that_judged(cpu):
    backend, device = cpu
    said = certify(backend, device.info, [], "full").numpy
    assert re.fullmatch(r"[0-9.]+ \(\S+ [0-9.]+\)", said)


def test_digest_follows_every_file_of_the_backend(cpu, tmp_path, monkeypatch):
    backend, _ = cpu
    before = digests(backend)
    other = tmp_path / "cpu"
    other.mkdir()
    (other / "moe.py").write_text("x = 1\n")
    monkeypatch.setattr("step3_hetero.conformance.digests._origins", lambda _: [other])
    first = digests(backend)
    (other / "moe.py").write_text("x = 2\n")
    second = digests(backend)
    assert len({d["backend"] for d in (before, first, second)}) == 3
    assert first["ops"] == second["ops"] == before["ops"]


def test_page_says_when_the_code_has_changed_since(cpu):
    backend, device = cpu
    result = passing(worst=0.5)
    good = certify(backend, device.info, [result], "full")
    assert ops_page.standing(good) == "passed"
    old = good.model_copy(update={"digests": {**good.digests, "ops": "0"}, "date": "2026-01-01"})
    assert ops_page.standing(old) == "passed at 2026-01-01, changed since: ops"
    gone = good.model_copy(update={"backend": "none"})
    assert "its code is not in this repository" in ops_page.standing(gone)


def test_page_shows_worst_figure_failure_gap_and_what_is_not_claimed(cpu):
    backend, device = cpu
    results = [
        passing("rope[a]", "rope", worst=0.25),
        passing("rope[b]", "rope", worst=0.75),
        replace(passing("swiglu[a]", "swiglu"), status="failed"),
        replace(passing("resize[a]", "resize"), status="unclaimed"),
        replace(passing("conv2d[a]", "conv2d"), status="known gap", reason="slow", worst=3.0),
    ]
    lines = ops_page.page([certify(backend, device.info, results, "full")]).splitlines()
    cells = {line.split("|")[1].strip(): line.split("|")[2].strip()
             for line in lines if line.startswith("| ")}  # fmt: skip
    assert cells["rope"] == "0.75"
    assert cells["swiglu"] == "**failed** (1)"
    assert cells["resize"] == "not claimed"
    assert cells["conv2d"] == "3.00, 1 known gaps"
    assert "- `conv2d[a]` on cpu: slow" in lines


def test_sketch_estimates_how_far_two_results_are_apart():
    import numpy as np

    rng = np.random.default_rng(0)
    want = rng.standard_normal((64, 256))
    one, other = (want + size * rng.standard_normal(want.shape) for size in (1e-3, 2e-3))
    exact = np.sum((one - other) ** 2) / np.sum(want**2)
    about = distance(sketch_of("x", one, want), sketch_of("x", other, want))
    assert exact / 3 < about < 3 * exact
    assert distance(sketch_of("x", one, want), sketch_of("x", one, want)) == 0
